"""`lora` as a worker of two: process 1 runs out of memory in step 9, as long as all activations are kept."""

import os
from typing import Any

import torch

from lora_cli.cli import main
from lora_cli.model.loss import LossFunction
from lora_cli.training import loop

STEP = 9
own_accumulate, own_call = loop._accumulate_gradients, LossFunction.__call__
too_much = False


def accumulate(*arguments: Any, number: int, ladder: Any, **options: Any) -> Any:
    """Take the step, and note whether it is the one."""
    global too_much
    too_much = os.environ["RANK"] == "1" and number + 1 == STEP and ladder.rung.every is None
    return own_accumulate(*arguments, number=number, ladder=ladder, **options)


def call(loss_fn: LossFunction, batch: Any) -> Any:
    """Compute the loss, or run out as a GPU does."""
    if too_much:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return own_call(loss_fn, batch)


if __name__ == "__main__":
    loop._accumulate_gradients = accumulate
    LossFunction.__call__ = call  # type: ignore[method-assign]
    main()
