"""`lora train`: fine-tune an adapter as a recipe describes, and verify the written adapter."""

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_cli.data.batches import BatchPlan
from lora_cli.data.collate import Batch
from lora_cli.model import adalora
from lora_cli.model.device import pick_device
from lora_cli.model.sharding import free_gathered, is_sharded
from lora_cli.recipe.resume_keys import Change
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console, metrics_log
from lora_cli.run.disk_space import check_free_space
from lora_cli.run.folder import RunFolder, open_run
from lora_cli.run.run_checksums import remove_run_checksums, write_run_checksums
from lora_cli.run.signals import stop_request
from lora_cli.setup import run_records
from lora_cli.setup.adapter_writer import AdapterWriter
from lora_cli.setup.evaluations import Evaluations, HeldOutAnswers, check_steps, describe_choice
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs, with_date, with_recorded_date
from lora_cli.setup.resume import check_inputs, check_model, describe_changes, find_run_state, record_changes
from lora_cli.setup.run_size import SMALLER, run_needs
from lora_cli.setup.start_workers import StartRequest, resumes_after_restart, start_workers
from lora_cli.setup.strategy import choose_strategy
from lora_cli.setup.training_model import Info, TrainableModel, build_model, check_before_rows
from lora_cli.training import checkpoint, cpu, process_group
from lora_cli.training.agreement import check_inputs_equal
from lora_cli.training.checkpoint_folders import SavedState
from lora_cli.training.device_errors import device_errors_as_lora_error
from lora_cli.training.distributed import any_process, broadcast_adapter
from lora_cli.training.failures import report_failures
from lora_cli.training.loop import fit
from lora_cli.training.loss_scale import LossScale
from lora_cli.training.loss_spikes import LossSpikes
from lora_cli.training.memory_ladder import MemoryLadder
from lora_cli.training.optimizer import averaged_weights, make_optimizer
from lora_cli.training.peers import Peers
from lora_cli.training.tracking import Tracking, tracking


def train(recipe: Recipe, *, resume: bool, fresh: bool, arguments: list[str], max_restarts: int = 0) -> int:
    """Train as `recipe` describes, in as many processes as it requests; return the exit code.

    Args:
        recipe: of the run.
        resume: continue from the newest checkpoint.
        fresh: move an existing run aside, and start again.
        arguments: of the command line, passed on to the worker processes.
        max_restarts: how often the workers are started again after one has died.

    Raises:
        LoraError: the recipe does not fit rows, model or machine, the run folder cannot be used, the loss is not
            finite, memory is too small, or the written adapter differs from the trained one.
    """
    if (code := start_workers(recipe, StartRequest(resume, fresh, arguments, max_restarts))) is not None:
        return code
    device = pick_device()
    peers = process_group.join_peers(recipe, device)
    with report_failures(peers):
        check_before_rows(recipe)
        accelerator = process_group.join_processes(device, deterministic=recipe.performance.deterministic)
        if resumes_after_restart(peers):
            resume, fresh = True, False
        if not accelerator.is_main_process:
            return _train_in_process(recipe, accelerator, peers, run=None, resume=resume)
        with open_run(recipe.output, resume=resume, fresh=fresh, arguments=arguments) as run:
            return _train_in_process(recipe, accelerator, peers, run=run, resume=resume)


def _train_in_process(
    recipe: Recipe, accelerator: Accelerator, peers: Peers | None, *, run: RunFolder | None, resume: bool
) -> int:
    """Load rows and model, take the steps, verify the adapter; return the exit code.

    Only the main process has `run` open: it alone writes and prints.
    """
    info: Info = console.info if run else console.no_output
    saved = None
    if resume:
        with accelerator.main_process_first():  # it alone sets damaged checkpoints aside
            saved = find_run_state(recipe, info=info if run else None)
        recipe = with_recorded_date(recipe)
    with accelerator.main_process_first():  # the main process encodes the rows, the others find them in the cache
        inputs = load_inputs(recipe, info=info)
    recipe = with_date(inputs.recipe, inputs.template_date)  # the run's recipe records it
    for line in inputs.data.ledger.table():
        info(line)
    plan = batch_plan(recipe, inputs, inputs.data.train, processes=accelerator.num_processes)
    total = plan.steps_in(epochs=recipe.training.epochs, max_steps=recipe.training.max_steps)
    for line in plan.describe(total):
        info(line)
    check_steps(recipe, total=total, held_out=inputs.data.eval is not None, info=info)
    strategy = choose_strategy(recipe, inputs, plan, any_process=lambda value: any_process(accelerator, value))
    if strategy.why:
        info(f"strategy: {strategy.name} ({strategy.why})")
    state = run_records.resume_state(recipe, inputs, plan, total=total, strategy=strategy.name)
    check_inputs_equal(peers, state, step=saved and saved.step, output=recipe.output)
    changes = check_inputs(saved, recipe, state) if saved else []
    with device_errors_as_lora_error(recipe, accelerator, sharded=strategy.name != "ddp"):
        model = build_model(recipe, inputs, plan, total=total, info=info, whole=strategy.kept_whole)
        model.ladder.lower_to(peers.wanted_form() if peers else None)
        training = Training(recipe, accelerator, inputs, plan, model, total=total, run=run, state=state)
        done = training.resume(saved, changes) if resume else 0
        training.prepare_run_folder(done, peers)
        with tracking(recipe.tracking, run.path if run else None, done=done, info=info) as trackers:
            exit_code = training.take_steps(done, trackers)
            if not exit_code:
                training.write_adapter()
            trackers.status = "stopped" if exit_code else "finished"
    accelerator.end_training()
    return exit_code


class Training:
    """The steps of one process: model, optimizer and plans, from the first step to the verified adapter."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        inputs: RunInputs,
        plan: BatchPlan,
        built: TrainableModel,
        *,
        total: int,
        run: RunFolder | None,
        state: dict[str, Any],
    ) -> None:
        """`built` is the model of `recipe` and `inputs`, to be trained for `total` steps over `plan`.

        Checkpoints record `state`, that of `run_records.resume_state`, with that of the model.
        """
        self.recipe, self.spec, self.inputs, self.plan, self.built = recipe, recipe.training, inputs, plan, built
        self.accelerator, self.run, self.total = accelerator, run, total
        self.info: Info = console.info if run else console.no_output
        self.model = built.model
        broadcast_adapter(self.model, accelerator)
        built.ladder.agree(accelerator)
        lr_ratio = recipe.adapter.lr_ratio
        self.optimizer = make_optimizer(self.model, self.spec, name=built.optimizer, lr_ratio=lr_ratio)
        self.rank_allocator = adalora.rank_allocator(self.model)
        self.state = {**state, **run_records.model_state(built)}
        self.spikes, self.scale = LossSpikes(), LossScale(enabled=torch.float16 in inputs.compute_dtypes)
        self.recorded: dict[str, LossSpikes | MemoryLadder | LossScale] = {
            "loss_spikes": self.spikes,
            "memory": built.ladder,
            "loss_scale": self.scale,
        }
        self.evaluations = Evaluations(recipe, inputs, self.model, self.optimizer, accelerator)
        self.sharded = is_sharded(self.model)
        # All processes answer with a sharded model, as they gather its layers together.
        wanted = (run is not None or self.sharded) and self.spec.answer_every is not None
        self.answers = HeldOutAnswers(recipe, inputs, self.model, self.optimizer, accelerator) if wanted else None
        # Of the base as it was loaded: its files are not needed any more.
        trained_on = run_records.trained_on(recipe, inputs, self.model, built, step=0)
        self.writer = AdapterWriter(self.model, recipe, inputs, trained_on)
        self.manifest: dict[str, Any] = {}
        self.first = 1  # step that this process takes first
        self.done = 0  # optimizer steps
        self.stopped_early = False

    def resume(self, saved: SavedState | None, changes: Sequence[Change]) -> int:
        """Continue from a checkpoint, with the changes of the recipe since then; return its step, 0 for None.

        Raises:
            LoraError: the checkpoint belongs to another model or adapter.
        """
        if saved is None:
            self.info("no checkpoint yet: starting from the first step")
            return 0
        check_model(saved, self.state)
        for line in describe_changes(saved, changes, self.state):
            self.info(line)
        checkpoint.load_checkpoint(
            saved,
            self.model,
            self.optimizer,
            rank_allocator=self.rank_allocator,
            history=self.evaluations.history,
        )
        for name, part in self.recorded.items():
            part.restore(saved.values[name])
        self.state["changes"] = record_changes(saved, changes)
        self.info(f"resuming after step {saved.step}")
        return saved.step

    def prepare_run_folder(self, done: int, peers: Peers | None) -> None:
        """Write recipe and manifest, and cut the logs to the `done` steps; tell `peers` that the run has begun.

        Raises:
            LoraError: the run does not fit on the disk.
        """
        self.first = done + 1
        if self.run is None:
            return
        base = Path(self.inputs.base.source.path)
        needs = run_needs(
            self.run.path, self.model, self.spec, optimizer=self.built.optimizer, base=base, total=self.total, done=done
        )
        check_free_space(needs, hint=SMALLER)
        if (earlier := self.run.move_earlier_aside()) is not None:
            self.info(f"--fresh: the earlier run is in {earlier}")
        remove_run_checksums(self.run.path, info=self.info)
        self.manifest = run_records.manifest(self.run, self.recipe, self.inputs, self.built, state=self.state)
        self.run.begin()
        # The recipe comes first: a folder with a part of a run, but without it, could be neither started nor resumed.
        run_records.write_records(self.run, self.recipe, self.manifest, info=self.info)
        self.run.checkpoints.mkdir(exist_ok=True)
        if peers:
            peers.mark_begun()
        # A start from step 0 evaluates the base again, so the records of step 0 are removed too.
        metrics_log.truncate_after(self.run.metrics, done or -1, info=self.info, complete_from=1)
        metrics_log.truncate_after(self.run.answers, done or -1, info=self.info)

    def take_steps(self, done: int, trackers: Tracking) -> int:
        """Train from step `done` to the last; return the exit code if a signal stopped it, else 0.

        Raises:
            LoraError: a loss or gradient is not finite.
        """
        self.done = done
        if done:
            self._complete_step(done)
        metrics = metrics_log.MetricsLog(self.run.metrics) if self.run else None
        answer_log = metrics_log.MetricsLog(self.run.answers) if self.run and self.answers else None
        timeout = timedelta(minutes=self.recipe.distributed.timeout_minutes)
        if done == 0:
            self._evaluate_start(metrics, answer_log)
        elif done < self.total and self.evaluations.should_stop:
            self.stopped_early = True
            self.info(
                f"this run is finished: it stopped early after step {done}; to go on, raise or remove "
                f"training.stop_after: {self.spec.stop_after}"
            )
            return 0
        self.accelerator.wait_for_everyone()  # for the first process, which answers prompts alone
        process_group.set_timeout(timeout)
        with (
            stop_request() as stop,
            console.step_progress(
                self.total, done=done, every=self.spec.log_every, bar=self.run is not None
            ) as progress,
        ):
            info = progress.info if self.run else console.no_output
            for step in fit(
                self.model,
                self.plan,
                spec=self.spec,
                optimizer=self.optimizer,
                accelerator=self.accelerator,
                total=self.total,
                start=done,
                task=self.recipe.task,
                rank_allocator=self.rank_allocator,
                spikes=self.spikes,
                ladder=self.built.ladder,
                scale=self.scale,
            ):
                self.done = step.number
                if metrics:
                    metrics.write({**step.record(), "peak_memory": cpu.peak_memory(self.inputs.device)})
                    progress.step(step.number, step.figures(self.inputs.device), loss=step.loss)
                    trackers.poll()  # they follow the metrics log by themselves
                if step.spike:
                    info(step.spike.line(step.number))
                if step.overflows:
                    info(f"step {step.number}: the gradient overflowed float16; loss scale {self.scale.value:g} now")
                last = step.number == self.total
                # Before the checkpoint: a resumed run continues after both, or completes them.
                evaluated = last or self.evaluations.is_due(step.number)
                if evaluated:
                    evaluated = self.evaluations.measure(step.number, metrics, info, stop.is_set)
                self.stopped_early = evaluated and not last and self.evaluations.should_stop
                last = last or self.stopped_early
                answering = last or _is_due(step.number, self.spec.answer_every)
                with process_group.one_works_alone(timeout) if answering else nullcontext():
                    if self.answers and answering:
                        self.answers.answer(step.number, answer_log, info, stop.is_set)
                    stopping = any_process(self.accelerator, stop.is_set())  # all leave the loop at the same step
                new_best = evaluated and self.evaluations.is_new_best(step.number)
                if last or stopping or new_best or _is_due(step.number, self.spec.save_every):
                    with process_group.one_works_alone(timeout):
                        self._save_checkpoint(step.number)
                if stopping:
                    info(f"stopped after step {step.number}, which is saved; --resume continues from there")
                    return stop.exit_code or 1
                if self.stopped_early:
                    info(self.evaluations.describe_stop(step.number, self.total))
                    break
        for log in (metrics, answer_log):
            if log:
                log.close()
        return 0

    def _complete_step(self, done: int) -> None:
        """Evaluate and answer after the last step done, where a signal stopped the run before that."""
        if self.evaluations.is_left_out(done, self.total):
            if self.run:
                metrics_log.remove_evaluation(self.run.metrics, done)  # of a resumed run that was killed meanwhile
            with metrics_log.MetricsLog(self.run.metrics) if self.run else nullcontext() as metrics:
                self.evaluations.measure(done, metrics, self.info)
            self._save_checkpoint(done)
        elif self.run:  # a kill may have stopped the removal of older ones
            keep, keep_best = self.spec.keep_checkpoints, self.spec.keep == "best"
            checkpoint.prune(self.run.checkpoints, keep, self.evaluations.history, keep_best=keep_best, info=self.info)
        ended = done == self.total or self.evaluations.should_stop
        left_out = bool(self.run and self.answers and self.answers.is_left_out(done, self.run.answers, ended=ended))
        if any_process(self.accelerator, left_out) and self.answers:
            if self.run:
                metrics_log.truncate_after(self.run.answers, done - 1, info=self.info)
            with metrics_log.MetricsLog(self.run.answers) if self.run else nullcontext() as answers:
                self.answers.answer(done, answers, self.info)

    def _evaluate_start(self, metrics: metrics_log.MetricsLog | None, answers: metrics_log.MetricsLog | None) -> None:
        """Evaluate the untrained model: the base, or the base with the adapter that training goes on from."""
        evaluations, source = self.evaluations, self.recipe.adapter.source
        evaluations.history.clear()
        if evaluations.plan is None:
            return
        measured = f"the base with the adapter in {source}" if source else "the base"
        self.info(f"measuring {measured} on {len(evaluations.plan.rows):,} held-out rows")
        evaluations.measure(0, metrics, self.info)
        if self.answers:
            self.answers.answer(0, answers, self.info)
        if evaluations.is_new_best(0):
            self._save_checkpoint(0)

    def _save_checkpoint(self, step: int) -> None:
        if self.run:
            checkpoint.save_checkpoint(
                self.run.checkpoints,
                self.model,
                self.optimizer,
                step=step,
                state={**self.state, **{name: part.to_json() for name, part in self.recorded.items()}},
                keep=self.spec.keep_checkpoints,
                write_adapter=lambda folder: self.writer.write_files(folder, step),
                rank_allocator=self.rank_allocator,
                history=self.evaluations.history,
                keep_best=self.spec.keep == "best",
            )
        self.accelerator.wait_for_everyone()
        free_gathered(self.model)

    def write_adapter(self) -> None:
        """Write the adapter of the last or the best step, and complete the manifest.

        Raises:
            LoraError: the written adapter differs from the trained one, or the best checkpoint is missing.
        """
        probe = self.plan.make_batch([int(self.inputs.data.train.lengths[:64].argmin())])  # a short row
        if self.run is None:
            if self.sharded:
                self.writer.verify_along(probe)
            return
        metrics_log.truncate_after(self.run.metrics, self.done, info=self.info, complete_from=self.first)
        step, best = self.done, self.evaluations.history.best
        if self.spec.keep == "best" and best is not None:
            for line in describe_choice(self.evaluations.history, step=step, source=self.recipe.adapter.source):
                self.info(line)
            step = best.step
        if step == self.done:
            with averaged_weights(self.optimizer):
                self._write_verified(self.run, step, probe)
        else:
            checkpoint.load_best(self.run.checkpoints, step, self.model, rank_allocator=self.rank_allocator)
            self._write_verified(self.run, step, probe)
        parts = run_records.describe_parts(self.evaluations.history, self.spikes, self.built.ladder, self.scale)
        result = {"steps_done": self.done, "stopped_early": self.stopped_early, "adapter_step": step, **parts}
        manifest = {**self.manifest, "result": {**result, "keep": self.spec.keep}}
        run_records.write_records(self.run, self.recipe, manifest, info=self.info)
        if summary := self.spikes.summary():
            self.info(summary)
        write_run_checksums(self.run.path)
        for line in run_records.describe_results(self.run, self.recipe, self.evaluations.history, step=step):
            self.info(line)
        console.out.print(str(self.run.adapter))

    def _write_verified(self, run: RunFolder, step: int, probe: Batch) -> None:
        """Write the model's adapter and its card, compared with what is read back."""
        card = run_records.model_card(
            run, self.recipe, self.inputs, self.evaluations.history, step=step, steps_done=self.done
        )
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        checkpoint.check_finite(trained, step=step, folder=run.checkpoints)
        if self.rank_allocator is not None:
            self.rank_allocator.prune()
        self.info(self.writer.write_verified(run.adapter, step, model_card=card, probe=probe))


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
