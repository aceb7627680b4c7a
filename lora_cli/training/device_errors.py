"""Report what a device cannot do, too little memory above all, as an error that names the keys to change."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.run.os_errors import is_out_of_memory

NOT_DETERMINISTIC = "does not have a deterministic implementation"  # torch has no exception class of its own for it


@contextmanager
def device_errors_as_lora_error(recipe: Recipe, accelerator: Accelerator, *, sharded: bool) -> Iterator[None]:
    """Within the block, raise a LoraError in place of torch's error; `sharded` is whether the base is.

    Raises:
        LoraError: the device of `accelerator` has too little memory, or an operation that is not deterministic.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if NOT_DETERMINISTIC in str(error):
            operation = str(error).partition(NOT_DETERMINISTIC)[0].strip()
            raise LoraError(
                f"performance.deterministic: torch has no deterministic form of {operation}, which this run needs",
                hint="write `performance: {deterministic: false}`",
                exit_code=1,
            ) from None
        if not is_out_of_memory(error):
            raise
        size = "training.tokens_per_batch" if recipe.data.packing else "training.batch_size"
        if recipe.training.tokens_per_batch == "auto":
            size = "data.max_length"
        message = f"{accelerator.device} has too little memory for a step"
        hint = f"lower {size}, or set training.gradient_checkpointing to true"
        if sharded and accelerator.device.type != "cpu" and not recipe.distributed.cpu_offload:
            hint += ", or distributed.cpu_offload: the layers then wait in host memory"
        raise LoraError(message, hint=hint, exit_code=1) from None
