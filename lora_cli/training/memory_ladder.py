"""The memory ladder: what a step that runs out of memory is taken again with, from the fastest form to the smallest.

    all activations are kept -> every 4th layer is recomputed in the backward pass -> every 2nd -> every layer
    -> their inputs wait in host memory -> batches are run in 2 parts, in 4, ...

With `training.tokens_per_batch: auto`, where a batch is a whole step, running it in as many parts as the recipe
accumulates comes first, before any recomputation.

Parts of a batch are accumulated, so that the tokens of a step stay what they are. On a GPU the largest batch is tried
before the first step; on the CPU, where the system ends a process rather than refuse it memory, and with a sharded
base, the first rung follows from the estimate of `model/memory.py`. A step that runs out later is taken again from its
begin: nothing of it is kept.

With a sharded base, the other processes wait within the step for the one that ran out, and cannot be called back: it
tells the launcher the next rung, all processes end, and start again from the newest checkpoint, in that form.
"""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.model.sharding import is_offloaded, is_sharded
from lora_cli.run.console import format_bytes
from lora_cli.run.os_errors import is_out_of_memory
from lora_cli.training.cpu import peak_memory
from lora_cli.training.distributed import any_process

EVERY = (4, 2, 1)  # of how many layers one is recomputed


class Rung(NamedTuple):
    """One form of running a batch."""

    every: int | None = None  # of how many layers one is recomputed in the backward pass; None: none is
    offload: bool = False  # whether the inputs of recomputed layers wait in host memory
    parts: int = 1  # in which each batch is run

    def describe(self) -> str:
        """Return the form in words: `every 2nd layer is recomputed`."""
        names = {None: "all activations are kept", 1: "every layer is recomputed", 2: "every 2nd layer is recomputed"}
        words = [names.get(self.every, f"every {self.every}th layer is recomputed")]
        words += ["their inputs wait in host memory"] if self.offload else []
        words += [f"batches are run in {self.parts} parts"] if self.parts > 1 else []
        return ", ".join(words)


class StartAgain(LoraError):
    """A process ran out of memory while others wait for it: all are to start again, in the form `rung`."""

    def __init__(self, what: str, rung: Rung) -> None:
        if rung.every is not None and not rung.offload and rung.parts == 1:
            other = "start them with --resume and training.gradient_checkpointing: true, which recomputes every layer"
        else:  # no key of a recipe begins with this form
            other = "lower data.max_length or training.tokens_per_batch, or quantize the base (quantization)"
        super().__init__(
            f"{what} ran out of memory: {rung.describe()} from here on",
            hint="all processes must start again in that form: torchrun --max-restarts 8 does it, where each form "
            f"takes one restart (raise the number if it has run out); or {other}",
            exit_code=1,
        )
        self.rung = rung


def all_rungs(
    *, setting: bool | str, can_recompute: bool, on_cpu: bool, max_parts: int, parts_first: int = 1
) -> list[Rung]:
    """Return the rungs of a run, the fastest first.

    Args:
        setting: `training.gradient_checkpointing`: false forbids recomputation, true means every layer.
        can_recompute: whether the model supports it.
        on_cpu: whether activations are in host memory anyway.
        max_parts: rows of the largest batch: further parts would be empty.
        parts_first: parts of a batch that are tried before layers are recomputed.
    """
    first = Rung(1 if can_recompute and setting is True else None)
    forms = [first]
    while forms[-1].parts < parts_first:
        forms.append(first._replace(parts=min(2 * forms[-1].parts, parts_first)))
    if can_recompute and setting is not False:
        forms += [Rung(every, parts=parts_first) for every in EVERY if first.every is None]
        forms += [] if on_cpu else [Rung(1, offload=True, parts=parts_first)]
    while forms[-1].parts < max_parts:
        forms.append(forms[-1]._replace(parts=forms[-1].parts * 2))
    return forms


def check_can_recompute(model: PreTrainedModel, setting: bool | str) -> None:
    """Check `training.gradient_checkpointing` against the model.

    Raises:
        LoraError: it is true, and the model's layers cannot be recomputed.
    """
    if setting is True and not model.supports_gradient_checkpointing:
        raise LoraError(
            f"training.gradient_checkpointing: {model.config.model_type} models cannot recompute their layers",
            hint="write auto or false",
        )


class MemoryLadder:
    """The rung of a run, which only goes down.

    A class, because the loop takes the next rung while it runs, and checkpoints record it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        setting: bool | str,
        can_recompute: bool,
        use_reentrant: bool,
        max_parts: int,
        reserve: int,
        info: Callable[[str], None],
        parts_first: int = 1,
    ) -> None:
        """Start with all activations kept, or with every layer recomputed if `setting` is true.

        Args:
            model: the base.
            setting: `training.gradient_checkpointing`.
            can_recompute: whether the model supports it with this adapter.
            use_reentrant: form of torch's checkpointing; bitsandbytes' int8 layers need it, because they keep their
                inputs where torch's other form does not see them.
            max_parts: rows of the largest batch.
            reserve: bytes that the optimizer takes at the first step.
            info: prints the rung when it changes.
            parts_first: parts of a batch that are tried before layers are recomputed.

        Raises:
            LoraError: `setting` is true, and the model's layers cannot be recomputed.
        """
        check_can_recompute(model, setting)
        self._model, self._use_reentrant, self._info, self._reserve = model, use_reentrant, info, reserve
        self._rungs = all_rungs(
            setting=setting,
            can_recompute=can_recompute and model.supports_gradient_checkpointing,
            on_cpu=model.device.type == "cpu",
            max_parts=max_parts,
            parts_first=min(parts_first, max_parts),
        )
        self.rung = Rung()
        self.set(self._rungs[0])

    def set(self, rung: Rung) -> None:
        """Run batches in the form of `rung` from now on."""
        if rung.every is not None and rung[:2] != self.rung[:2]:
            self._model.activation_checkpointing_enable(
                {"use_reentrant": self._use_reentrant}, every_n_layers=rung.every, offload=rung.offload
            )
            self._model.enable_input_require_grads()
        self.rung = rung

    def below(self) -> list[Rung]:
        """Return the rungs that are left, the fastest first."""
        return self._rungs[self._rungs.index(self.rung) + 1 :]

    def go_down(self, what: str) -> None:
        """Take the next rung, after `what` ran out of memory: `step 7`.

        Raises:
            LoraError: there is none.
        """
        self.set(self._next(what))
        self._info(f"{what} ran out of memory: {self.rung.describe()} from here on")

    def start_again(self, what: str) -> NoReturn:
        """End this process, after `what` ran out of memory while the others wait for this one.

        Raises:
            StartAgain: all processes are to start again with the next rung.
            LoraError: there is none.
        """
        raise StartAgain(what, self._next(what))

    def _next(self, what: str) -> Rung:
        left = self.below()
        if not left:
            hint = "lower data.max_length, quantize the base (quantization), or lower adapter.rank; "
            if is_sharded(self._model) and self._model.device.type != "cpu" and not is_offloaded(self._model):
                hint += "distributed.cpu_offload: true keeps the layers in host memory; "
            raise LoraError(
                f"{self._model.device} has too little memory for {what}: {self.rung.describe()}, and that is the "
                "smallest form",
                hint=f"{hint}with training.gradient_checkpointing: false, write auto",
                exit_code=1,
            )
        return left[0]

    def rehearse(self, run_batch: Callable[[], None], accelerator: Accelerator, *, tokens: int, started: bool) -> None:
        """Try the largest batch, and go down until it fits; for GPUs.

        Args:
            run_batch: computes loss and gradients of the largest batch, and drops the gradients.
            accelerator: all processes take the same rung.
            tokens: of that batch.
            started: whether the optimizer has its memory already.

        Raises:
            StartAgain: it does not fit in the present form, and the base is sharded.
            LoraError: it does not fit in any form.
        """
        device, what = self._model.device, f"the largest batch ({tokens:,} tokens)"
        start = time.perf_counter()
        while True:
            ran_out = self._runs_out(run_batch, 0 if started else self._reserve, device)
            if ran_out and is_sharded(self._model):
                self.start_again(what)
            if not any_process(accelerator, ran_out):
                break
            self.go_down(what)
        self._info(
            f"memory: {self.rung.describe()}; the largest batch ({tokens:,} tokens) peaks at "
            f"{format_bytes(peak_memory(device))}, tried in {time.perf_counter() - start:.1f} s"
        )

    def _runs_out(self, run_batch: Callable[[], None], reserve: int, device: torch.device) -> bool:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ran_out, held = False, None
        try:
            held = torch.empty(reserve, dtype=torch.uint8, device=device)
            run_batch()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            ran_out = True
        del held
        release_memory(device)
        return ran_out

    def agree(self, accelerator: Accelerator) -> None:
        """Take the lowest rung of all processes: each has estimated its own free memory."""
        if accelerator.num_processes > 1:
            rungs = [Rung(*values) for values in gather_object([tuple(self.rung)])]
            self.set(max(rungs, key=self._rungs.index))

    def to_json(self) -> dict[str, Any]:
        """Return the rung for a checkpoint."""
        return dict(self.rung._asdict())

    def lower_to(self, values: Mapping[str, Any] | None) -> bool:
        """Take a rung, as `to_json` returns it, if it is below the present one, and return whether it is; None: no."""
        rung = None if values is None else Rung(*(values[name] for name in Rung._fields))
        if rung is None or rung not in self.below():
            return False
        self.set(rung)
        return True

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take the rung of a checkpoint, if it is below the present one: a resumed run takes the same steps."""
        if self.lower_to(values):
            return
        rung = Rung(*(values[name] for name in Rung._fields))
        # With dropout, each part of a batch draws its own numbers: as many parts, if this run has such a form.
        same = next((each for each in (self.rung, *self.below()) if each.parts == rung.parts), None)
        if same is not None:
            self.set(same)
        else:
            self._info(
                f"--resume: {self.rung.describe()}; before: {rung.describe()}: "
                "the result differs from an uninterrupted run's by dropout and rounding"
            )


def release_memory(device: torch.device) -> None:
    """Give back what a step that ran out has left: call it where nothing refers to its tensors or its exception."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def drop_gradients(parameters: list[nn.Parameter]) -> None:
    """Drop the gradients of a step that is not taken."""
    for parameter in parameters:
        parameter.grad = None
