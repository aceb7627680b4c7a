"""Report too little memory of the device, GPU or CPU, as an error that names the keys which lower the need."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from lora_cli.errors import LoraError
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.run.os_errors import is_out_of_memory


@contextmanager
def out_of_memory_as_lora_error(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Within the block, raise a LoraError in place of torch's error.

    Raises:
        LoraError: the device of `accelerator` has too little memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = "tokens_per_batch" if recipe.data.packing else "batch_size"
        message = f"{accelerator.device} has too little memory for a step"
        hint = f"lower training.{size}, or set training.gradient_checkpointing to true"
        if not accelerator.is_local_main_process:
            # It may have happened in this process alone, and `main` prints only for the first process of a machine.
            console.info(f"error: {message}")
            console.info(f"hint: {hint}")
        raise LoraError(message, hint=hint, exit_code=1) from None
