"""`lora train`: from a recipe to a verified adapter."""

import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel

from lora_cli.commands import card
from lora_cli.commands.opening import Opening, batch_plan, coverage_table, load_base, open_run_inputs
from lora_cli.data.batches import Plan
from lora_cli.errors import LoraError
from lora_cli.evaluation.likelihood import Likelihood, measure
from lora_cli.model import adapter, base, fused, isolation, memory, targets
from lora_cli.model.score import Scorer
from lora_cli.recipe.dump import dump_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.run import atomic, console, journal
from lora_cli.run.folder import RunFolder, open_run
from lora_cli.training import checkpoint, host, launch
from lora_cli.training.disk import full_disk_is_os_error
from lora_cli.training.interrupt import StopWish, stop_after_step
from lora_cli.training.loop import Step, fit
from lora_cli.training.optim import make_optimizer

Say = Callable[[str], None]


def train(recipe: Recipe, *, resume: bool, fresh: bool, arguments: list[str]) -> int:
    """Train as `recipe` says, in as many processes as it wants; returns the exit code.

    `arguments` are those of the command line, for the processes that are started to share the work.
    """
    if not launch.launched():
        processes = launch.wanted_processes(recipe.distributed)
        if processes > 1:
            # What would refuse the run refuses it here, once, and not in every process.
            with open_run(recipe.output, resume=resume, fresh=fresh):
                open_run_inputs(recipe.model, recipe.data, seed=recipe.training.seed, say=console.say)
            console.say(f"starting {processes} processes")
            return launch.spawn(processes, arguments)
    on_cpu = base.pick_device().type == "cpu"
    accelerator = launch.join(cpu=on_cpu)
    if on_cpu:
        host.set_up_cpu(launch.neighbours(accelerator))
    with launch.outliving_peers():
        if not accelerator.is_main_process:
            return Training(recipe, accelerator, run=None, resume=resume).go()
        with open_run(recipe.output, resume=resume, fresh=fresh) as run, full_disk_is_os_error(run.path):
            return Training(recipe, accelerator, run=run, resume=resume).go()


class Training:
    """One process's part of a run; `run` is open in the first process only, which alone writes and speaks."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, *, run: RunFolder | None, resume: bool) -> None:
        self.recipe, self.spec = recipe, recipe.training
        self.accelerator, self.run, self.resume = accelerator, run, resume
        self.say: Say = console.say if run else console.silence

    def go(self) -> int:
        """Rows, base, adapter, steps, proof; returns the exit code."""
        with self.accelerator.main_process_first():  # the first process encodes, the others find it done
            opening = open_run_inputs(self.recipe.model, self.recipe.data, seed=self.spec.seed, say=self.say)
        for line in opening.data.ledger.table():
            self.say(line)
        world = self.accelerator.num_processes
        plan = batch_plan(self.recipe, opening, opening.data.train, per_step=world * self.spec.gradient_accumulation)
        total = plan.steps_in(epochs=self.spec.epochs, max_steps=self.spec.max_steps)
        self.say(
            f"{total:,} step{'s' * (total > 1)} of {plan.per_step} batch{'es' * (plan.per_step > 1)}, "
            f"{plan.steps_per_epoch:,} an epoch; {plan.fill:.1%} of each batch is tokens"
        )
        built = build(self.recipe, opening, tokens=plan.largest, say=self.say)
        optimizer = make_optimizer((p for p in built.model.parameters() if p.requires_grad), self.spec)
        same = self._resumable(opening, built, plan, total)
        done = 0
        if self.resume:
            done = checkpoint.load(Path(self.recipe.output) / "checkpoints", built.model, optimizer, state=same)
            self.say(f"resuming after step {done}" if done else "no checkpoint yet: starting from the first step")
        if self.run:
            self._begin(self.run, opening, built, total, done)
        try:
            stopped = self._steps(opening, built.model, plan, optimizer, total=total, done=done, same=same)
        except torch.OutOfMemoryError:
            raise self._out_of_memory() from None
        if self.run and not stopped:
            self._finish(self.run, opening, built.model)
        self.accelerator.end_training()
        return stopped

    def _begin(self, run: RunFolder, opening: Opening, built: "Built", total: int, done: int) -> None:
        run.checkpoints.mkdir(exist_ok=True)
        atomic.write_text(run.recipe, dump_recipe(self.recipe))
        atomic.write_json(run.manifest, _manifest(self.recipe, opening, built, total))
        # A start from nothing evaluates the base again, so not even step 0 stays.
        journal.truncate_after(run.metrics, done or -1)

    def _steps(
        self,
        opening: Opening,
        model: PeftModel,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        *,
        total: int,
        done: int,
        same: dict[str, Any],
    ) -> int:
        """Train from step `done` to `total`; returns the exit code if a signal ended it before, else 0."""
        spec, run = self.spec, self.run
        held_out = opening.data.eval
        eval_plan = batch_plan(self.recipe, opening, held_out, per_step=1) if held_out else None
        scorer = Scorer(model)
        metrics = journal.Journal(run.metrics) if run else None

        def evaluate(step: int, say: Say) -> None:
            if eval_plan is None:
                return
            found = measure(scorer, eval_plan, accelerator=self.accelerator)
            if not math.isfinite(found.loss):
                raise LoraError(
                    f"the loss on the held-out rows is not finite at step {step}",
                    hint="it is the base model's own: see model.path and model.dtype"
                    if step == 0
                    else "the last checkpoint is from before it; try a lower training.learning_rate",
                    exit_code=1,
                )
            say(f"eval at step {step}: {_shown(found)}")
            if metrics:
                metrics.write({"step": step, "eval_loss": found.loss, "eval_accuracy": found.accuracy})

        def save(step: int) -> None:
            if run:
                checkpoint.save(run.checkpoints, model, optimizer, step=step, state=same, keep=spec.keep_checkpoints)
            self.accelerator.wait_for_everyone()

        if done == 0 and held_out:
            self.say(f"measuring the base on {len(held_out):,} held-out rows")
            evaluate(0, self.say)
        with (
            stop_after_step() as wish,
            console.meter(total, done=done, every=spec.log_every, bar=run is not None) as meter,
        ):
            say = meter.say if run else console.silence
            for step in fit(
                model, plan, spec=spec, optimizer=optimizer, accelerator=self.accelerator, total=total, start=done
            ):
                if metrics:
                    metrics.write(_record(step))
                    meter.step(step.number, _figures(step, opening.device))
                last = step.number == total
                stopping = not last and self._anyone_wishes(wish)
                # Before the checkpoint: a resumed run starts behind both.
                if last or _due(step.number, spec.eval_every):
                    evaluate(step.number, say)
                if last or stopping or _due(step.number, spec.save_every):
                    save(step.number)
                if stopping:
                    say(f"stopped after step {step.number}, which is saved; --resume goes on from there")
                    return wish.exit_code or 1
        if metrics:
            metrics.close()
        return 0

    def _anyone_wishes(self, wish: StopWish) -> bool:
        """All processes must leave the loop at the same step, whichever of them got the signal."""
        if self.accelerator.num_processes == 1:
            return wish.signal is not None
        mine = torch.tensor(int(wish.signal is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, reduction="sum"))

    def _out_of_memory(self) -> LoraError:
        size = "tokens_per_batch" if self.recipe.data.packing else "batch_size"
        message = f"{self.accelerator.device} has too little memory for a step"
        hint = f"lower training.{size}, or set training.gradient_checkpointing to true"
        if not self.accelerator.is_local_main_process:
            # It may have come to this process alone, and `main` lets only the first of a machine speak.
            console.say(f"error: {message}")
            console.say(f"hint: {hint}")
        return LoraError(message, hint=hint, exit_code=1)

    def _resumable(self, opening: Opening, built: "Built", plan: Plan, total: int) -> dict[str, Any]:
        """What must not change for a resumed run to be the uninterrupted one."""
        without_effect = {"eval_every", "save_every", "keep_checkpoints", "log_every", "gradient_accumulation"}
        return {
            "total_steps": total,
            "batches_per_step": plan.per_step,
            "data": opening.data.fingerprint,
            "model": base.fingerprint(opening.source),
            "dtype": str(opening.dtype).removeprefix("torch."),
            "attention": built.model.get_base_model().config._attn_implementation,
            "training": self.spec.model_dump(mode="json", exclude=without_effect),
            "adapter": self.recipe.adapter.model_dump(mode="json"),
            "quantization": self.recipe.quantization and self.recipe.quantization.model_dump(mode="json"),
        }

    def _finish(self, run: RunFolder, opening: Opening, model: PeftModel) -> None:
        """Write the adapter, load it back, and only then put it in its place.

        Raises:
            LoraError: what was written is not what was trained.
        """
        evals = [record for record in journal.read(run.metrics) if "eval_loss" in record]
        results = {
            name: {"loss": record["eval_loss"], "accuracy": record["eval_accuracy"]}
            for name, record in zip(("base", "adapter"), (*evals[:1], *evals[1:][-1:]), strict=False)
        }
        text = card.render(
            self.recipe,
            recipe_text=dump_recipe(self.recipe),
            ledger=opening.data.ledger.to_json(),
            results=results,
        )
        probe = min((opening.data.train[i] for i in range(min(64, len(opening.data.train)))), key=_length)
        with atomic.folder(run.adapter, replace=True) as partial:
            model_spec = self.recipe.model
            adapter.save(model, partial, base=model_spec.path, revision=model_spec.revision)
            opening.tokenizer.save_pretrained(str(partial))
            (partial / "README.md").write_text(text, encoding="utf-8")
            difference = adapter.reload_difference(model, partial, lambda: _logits(model, probe.input_ids))
            if difference != 0:
                raise LoraError(
                    f"the adapter that was written differs from the one trained, by {difference:.3g}",
                    hint="nothing was put in place; the last checkpoint holds the trained tensors",
                    exit_code=1,
                )
        self.say("verified: the adapter on disk, loaded back, is the trained model (difference 0)")
        if len(results) == 2:
            before, after = results["base"]["loss"], results["adapter"]["loss"]
            self.say(f"eval loss {before:.4f} -> {after:.4f} ({after / before - 1:+.1%})")
        console.out.print(f"{self.recipe.output}/adapter")


class Built(NamedTuple):
    """The model with its adapter, ready to train."""

    model: PeftModel
    trainable: int  # parameters
    proof: isolation.Proof | None  # of packed rows kept apart
    fused: int  # LoRA layers with the fused forward


def build(recipe: Recipe, opening: Opening, *, tokens: int, say: Say) -> Built:
    """Load the base, choose its attention, put the adapter on it, and say what was done."""
    model, proof = load_base(recipe, opening)
    layers = targets.linear_layers(model)
    peft_model = adapter.attach(model, recipe.adapter, seed=recipe.training.seed)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    where = f"{str(opening.dtype).removeprefix('torch.')} on {opening.device}"
    say(f"{card.public(recipe.model.path)}: {where}, attention {model.config._attn_implementation}")
    if proof:
        seen = f"by {proof.leak:.0e} of their size" if proof.leak else "by nothing"
        say(f"packing tried on this model: changing one row changes its neighbour's logits {seen}")
    for line in coverage_table(adapter.coverage(peft_model, layers), trainable):
        say(line)
    if _checkpoints_activations(recipe, opening, model, trainable, tokens, say):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return Built(peft_model, trainable, proof, fused.fuse(peft_model))


def _checkpoints_activations(
    recipe: Recipe, opening: Opening, model: Any, trainable: int, tokens: int, say: Say
) -> bool:
    """Whether to recompute activations; `auto` does so where the memory plan does not fit otherwise."""
    wanted = recipe.training.gradient_checkpointing
    if wanted != "auto":
        return wanted
    estimate = memory.plan(
        model,
        dtype=opening.dtype,
        trainable=trainable,
        tokens=tokens,
        longest=int(opening.data.train.lengths.max()),
        checkpointing=False,
        quantization=recipe.quantization,
        on_cpu=opening.device.type == "cpu",
    )
    # The weights are loaded by now, so what is free has to hold the rest.
    rest, free = estimate.total - estimate.weights - estimate.process, memory.available(opening.device)
    if rest > 0.9 * free:
        say(f"gradient checkpointing: on, a step needs about {console.size(rest)} and {console.size(free)} is free")
        return True
    return False


def _manifest(recipe: Recipe, opening: Opening, built: Built, total: int) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "lora-cli")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "base": {
            "path": recipe.model.path,
            "revision": recipe.model.revision,
            "commit": base.commit(opening.source),
            "fingerprint": base.fingerprint(opening.source),
            "dtype": str(opening.dtype).removeprefix("torch."),
        },
        "device": opening.device.type,
        "seed": recipe.training.seed,
        "steps": total,
        "trainable_parameters": built.trainable,
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
        "mem": console.size(host.peak_memory(device)),
    }


def _shown(found: Likelihood) -> str:
    return f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}, token accuracy {found.accuracy:.1%}"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _length(row: Any) -> int:
    return len(row.input_ids)


@torch.no_grad()
def _logits(model: PeftModel, ids: Any) -> torch.Tensor:
    """Logits of one row, as any user of the adapter would get them."""
    inner = model.get_base_model()
    training, implementation = model.training, inner.config._attn_implementation
    model.eval()
    inner.set_attn_implementation("eager")
    logits: torch.Tensor = model(input_ids=torch.tensor([ids.tolist()], device=inner.device)).logits
    inner.set_attn_implementation(implementation)
    model.train(training)
    return logits
