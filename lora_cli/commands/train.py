"""`lora train`: from a recipe to a verified adapter."""

import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_cli.data import class_labels
from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.errors import LoraError
from lora_cli.evaluation.likelihood import describe_likelihood, measure_likelihood
from lora_cli.model import adalora, base_model, save_adapter, trained_on
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.run import atomic, console, metrics_log
from lora_cli.run.folder import RunFolder, open_run
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs
from lora_cli.setup.training_model import Info, TrainableModel, build_model, prepare_for_compute
from lora_cli.training import checkpoint, cpu, launch, model_card
from lora_cli.training.disk_full import disk_full_as_os_error
from lora_cli.training.loop import Step, broadcast_adapter, fit
from lora_cli.training.optimizer import make_optimizer
from lora_cli.training.signals import StopRequest, stop_after_step


def train(recipe: Recipe, *, resume: bool, fresh: bool, arguments: list[str]) -> int:
    """Train as `recipe` says, in as many processes as it wants; returns the exit code.

    `arguments` are those of the command line, for the processes that are started to share the work.
    """
    if not launch.is_worker():
        processes = launch.resolve_processes(recipe.distributed)
        if processes > 1:
            # What would refuse the run refuses it here, once, and not in every process.
            with open_run(recipe.output, resume=resume, fresh=fresh):
                load_inputs(recipe, info=console.info)
            console.info(f"starting {processes} processes")
            return launch.launch_workers(processes, arguments)
    on_cpu = base_model.pick_device().type == "cpu"
    accelerator = launch.join_processes(cpu=on_cpu)
    if on_cpu:
        cpu.set_up_cpu(launch.local_world_size(accelerator))
    with launch.report_lost_peer():
        if not accelerator.is_main_process:
            return Training(recipe, accelerator, run=None, resume=resume).go()
        with open_run(recipe.output, resume=resume, fresh=fresh) as run, disk_full_as_os_error(run.path):
            return Training(recipe, accelerator, run=run, resume=resume).go()


class Training:
    """One process's part of a run; `run` is open in the first process only, which alone writes and speaks."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, *, run: RunFolder | None, resume: bool) -> None:
        self.recipe, self.spec = recipe, recipe.training
        self.accelerator, self.run, self.resume = accelerator, run, resume
        self.info: Info = console.info if run else console.no_output
        self.rank_allocator: adalora.AdaLoraRankAllocator | None = None

    def go(self) -> int:
        """Rows, base, adapter, steps, proof; returns the exit code."""
        with self.accelerator.main_process_first():  # the first process encodes, the others find it done
            opening = load_inputs(self.recipe, info=self.info)
        for line in opening.data.ledger.table():
            self.info(line)
        world = self.accelerator.num_processes
        plan = batch_plan(
            self.recipe, opening, opening.data.train, batches_per_step=world * self.spec.gradient_accumulation
        )
        total = plan.steps_in(epochs=self.spec.epochs, max_steps=self.spec.max_steps)
        self.info(
            f"{total:,} step{'s' * (total > 1)} of {plan.batches_per_step} batch{'es' * (plan.batches_per_step > 1)}, "
            f"{plan.steps_per_epoch:,} an epoch; {plan.token_share:.1%} of each batch is tokens"
        )
        try:
            stopped = self._train(opening, plan, total)
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        self.accelerator.end_training()
        return stopped

    def _train(self, opening: RunInputs, plan: BatchPlan, total: int) -> int:
        """Build, take the steps, prove; returns the exit code."""
        built = build_model(self.recipe, opening, plan, total=total, info=self.info)
        broadcast_adapter(built.model, self.accelerator)
        ratio = self.recipe.adapter.lr_ratio
        optimizer = make_optimizer(built.model, self.spec, name=built.optimizer, lr_ratio=ratio)
        self.rank_allocator = adalora.rank_allocator(built.model)
        same = self._resumable(opening, built, plan, total)
        done = 0
        if self.resume:
            folder = Path(self.recipe.output) / "checkpoints"
            done = checkpoint.load_checkpoint(
                folder, built.model, optimizer, state=same, rank_allocator=self.rank_allocator
            )
            self.info(f"resuming after step {done}" if done else "no checkpoint yet: starting from the first step")
        if self.run:
            self._begin(self.run, opening, built, total, done)
        stopped = self._steps(opening, built.model, plan, optimizer, total=total, done=done, same=same)
        if self.run and not stopped:
            self._finish(self.run, opening, built.model, plan)
        return stopped

    def _begin(self, run: RunFolder, opening: RunInputs, built: TrainableModel, total: int, done: int) -> None:
        run.clear()
        run.checkpoints.mkdir(exist_ok=True)
        atomic.write_text(run.recipe, dump_recipe(self.recipe))
        atomic.write_json(run.manifest, _manifest(self.recipe, opening, built, total))
        # A start from nothing evaluates the base again, so not even step 0 stays.
        metrics_log.truncate_after(run.metrics, done or -1)

    def _steps(
        self,
        opening: RunInputs,
        model: PeftModel,
        plan: BatchPlan,
        optimizer: torch.optim.Optimizer,
        *,
        total: int,
        done: int,
        same: dict[str, Any],
    ) -> int:
        """Train from step `done` to `total`; returns the exit code if a signal ended it before, else 0."""
        spec, run = self.spec, self.run
        held_out = opening.data.eval
        eval_plan = batch_plan(self.recipe, opening, held_out, batches_per_step=1) if held_out else None
        loss_fn = LossFunction(model, task=self.recipe.task)
        metrics = metrics_log.MetricsLog(run.metrics) if run else None

        def evaluate(step: int, info: Info) -> None:
            if eval_plan is None:
                return
            found = measure_likelihood(loss_fn, eval_plan, accelerator=self.accelerator)
            if not math.isfinite(found.loss):
                raise LoraError(
                    f"the loss on the held-out rows is not finite at step {step}",
                    hint="it is the base model's own: see model.path and model.dtype"
                    if step == 0
                    else "the last checkpoint is from before it; try a lower training.learning_rate",
                    exit_code=1,
                )
            info(f"eval at step {step}: {describe_likelihood(found, self.recipe.task)}")
            if metrics:
                metrics.write({"step": step, "eval_loss": found.loss, "eval_accuracy": found.accuracy})

        def save(step: int) -> None:
            if run:
                checkpoint.save_checkpoint(
                    run.checkpoints,
                    model,
                    optimizer,
                    step=step,
                    state=same,
                    keep=spec.keep_checkpoints,
                    write_adapter=lambda folder: self._write(model, opening, folder),
                    rank_allocator=self.rank_allocator,
                )
            self.accelerator.wait_for_everyone()

        if done == 0 and held_out:
            self.info(f"measuring the base on {len(held_out):,} held-out rows")
            evaluate(0, self.info)
        with (
            stop_after_step() as stop_request,
            console.step_progress(total, done=done, every=spec.log_every, bar=run is not None) as meter,
        ):
            info = meter.info if run else console.no_output
            for step in fit(
                model,
                plan,
                spec=spec,
                optimizer=optimizer,
                accelerator=self.accelerator,
                total=total,
                start=done,
                task=self.recipe.task,
                rank_allocator=self.rank_allocator,
            ):
                if metrics:
                    metrics.write(_record(step))
                    meter.step(step.number, _figures(step, opening.device))
                last = step.number == total
                stopping = not last and self._any_stop_request(stop_request)
                # Before the checkpoint: a resumed run starts behind both.
                if last or _due(step.number, spec.eval_every):
                    evaluate(step.number, info)
                if last or stopping or _due(step.number, spec.save_every):
                    save(step.number)
                if stopping:
                    info(f"stopped after step {step.number}, which is saved; --resume goes on from there")
                    return stop_request.exit_code or 1
        if metrics:
            metrics.close()
        return 0

    def _any_stop_request(self, stop_request: StopRequest) -> bool:
        """All processes must leave the loop at the same step, whichever of them got the signal."""
        if self.accelerator.num_processes == 1:
            return stop_request.signal is not None
        mine = torch.tensor(int(stop_request.signal is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, reduction="sum"))

    def _out_of_memory(self) -> LoraError:
        size = "tokens_per_batch" if self.recipe.data.packing else "batch_size"
        message = f"{self.accelerator.device} has too little memory for a step"
        hint = f"lower training.{size}, or set training.gradient_checkpointing to true"
        if not self.accelerator.is_local_main_process:
            # It may have come to this process alone, and `main` lets only the first of a machine speak.
            console.info(f"error: {message}")
            console.info(f"hint: {hint}")
        return LoraError(message, hint=hint, exit_code=1)

    def _resumable(self, opening: RunInputs, built: TrainableModel, plan: BatchPlan, total: int) -> dict[str, Any]:
        """What must not change for a resumed run to be the uninterrupted one."""
        without_effect = {"eval_every", "save_every", "keep_checkpoints", "log_every", "gradient_accumulation"}
        return {
            "total_steps": total,
            "batches_per_step": plan.batches_per_step,
            "data": opening.data.fingerprint,
            "model": base_model.fingerprint(opening.source),
            "dtype": str(opening.dtype).removeprefix("torch."),
            "attention": built.model.get_base_model().config._attn_implementation,
            "training": self.spec.model_dump(mode="json", exclude=without_effect),
            "task": self.recipe.task,
            "labels": opening.data.labels and list(opening.data.labels.names),
            "optimizer": built.optimizer,
            "adapter": self.recipe.adapter.model_dump(mode="json"),
            "quantization": self.recipe.quantization and self.recipe.quantization.model_dump(mode="json"),
        }

    def _write(self, model: PeftModel, opening: RunInputs, folder: Path) -> None:
        """A plain PEFT adapter, with the tokenizer that it was trained with."""
        spec = self.recipe.model
        save_adapter.save_adapter(model, folder, base=spec.path, revision=spec.revision)
        opening.tokenizer.save_pretrained(str(folder))
        trained_on.write_trained_on(_origin(self.recipe, opening, model), folder)
        if opening.data.labels is not None:
            class_labels.save_labels(opening.data.labels, folder)

    def _finish(self, run: RunFolder, opening: RunInputs, model: PeftModel, plan: BatchPlan) -> None:
        """Write the adapter, load it back, and only then put it in its place.

        Raises:
            LoraError: what was written is not what was trained.
        """
        evals = [record for record in metrics_log.read_metrics(run.metrics) if "eval_loss" in record]
        results = {
            name: {"loss": record["eval_loss"], "accuracy": record["eval_accuracy"]}
            for name, record in zip(("base", "adapter"), (*evals[:1], *evals[1:][-1:]), strict=False)
        }
        text = model_card.render_model_card(
            self.recipe,
            recipe_text=dump_recipe(self.recipe),
            ledger=opening.data.ledger.to_json(),
            results=results,
        )
        if self.rank_allocator is not None:
            self.rank_allocator.prune()
        lengths = opening.data.train.lengths
        probe = plan.make_batch([int(lengths[:64].argmin())])
        with atomic.folder(run.adapter, replace=True) as partial:
            self._write(model, opening, partial)
            (partial / "README.md").write_text(text, encoding="utf-8")
            difference = save_adapter.difference_when_loaded(
                model, partial, lambda one: self._logits(one, probe), prepare_for_compute
            )
            if not difference.is_none(opening.dtype):
                raise LoraError(
                    "the adapter that was written differs from the one trained: "
                    f"its tensors by {difference.tensors:.3g}, logits by {difference.logits:.3g} of their size",
                    hint="nothing was put in place; the last checkpoint holds the trained tensors",
                    exit_code=1,
                )
        rest = f", logits within {difference.logits:.0e}" if difference.logits else ""
        self.info(f"verified: the adapter on disk, loaded back, is the trained model (difference 0{rest})")
        if len(results) == 2:
            before, after = results["base"]["loss"], results["adapter"]["loss"]
            self.info(f"eval loss {before:.4f} -> {after:.4f} ({after / before - 1:+.1%})")
        console.out.print(f"{self.recipe.output}/adapter")

    @torch.no_grad()
    def _logits(self, model: PeftModel, batch: Batch) -> torch.Tensor:
        """What the model says of one row, with nothing random."""
        model.eval()
        return LossFunction(model, task=self.recipe.task).logits(batch).double()


def _origin(recipe: Recipe, opening: RunInputs, model: PeftModel) -> trained_on.TrainedOn:
    spec = recipe.quantization
    return trained_on.TrainedOn(
        commit=base_model.hub_commit(opening.source),
        fingerprint=base_model.fingerprint(opening.source),
        architecture=type(model.get_base_model()).__name__,
        dtype=str(opening.dtype).removeprefix("torch."),
        quantization=spec.model_dump(mode="json") if spec else None,
    )


def _manifest(recipe: Recipe, opening: RunInputs, built: TrainableModel, total: int) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "lora-cli")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "base": {
            "path": recipe.model.path,
            "revision": recipe.model.revision,
            **_origin(recipe, opening, built.model)._asdict(),
        },
        "device": opening.device.type,
        "seed": recipe.training.seed,
        "steps": total,
        "trainable_parameters": built.trainable,
        "task": recipe.task,
        "labels": opening.data.labels and opening.data.labels._asdict(),
        "optimizer": built.optimizer,
        "packing_proof": built.proof._asdict() if built.proof else None,
        "data_fingerprint": opening.data.fingerprint,
        "ledger": opening.data.ledger.to_json(),
    }


def _record(step: Step) -> dict[str, float]:
    """A line of metrics.jsonl; `step` is its key in every record, as `journal.truncate_after` wants."""
    values = step._asdict()
    return {"step": values.pop("number"), **values}


def _figures(step: Step, device: torch.device) -> dict[str, str]:
    return {
        "loss": f"{step.loss:.4f}",
        "lr": f"{step.learning_rate:.2e}",
        "grad": f"{step.grad_norm:.2f}",
        "tok/s": f"{step.tokens / step.seconds:.0f}",
        "mem": console.format_bytes(cpu.peak_memory(device)),
    }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
