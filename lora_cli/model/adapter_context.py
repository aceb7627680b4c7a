"""What an adapter is made for, besides the base model and the recipe's adapter section."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.recipe.tasks import TaskName

StateDict = Mapping[str, Tensor]  # full name of a tensor → the tensor


class AdapterContext(NamedTuple):
    """The run around an adapter; the default is that of a causal model of which only shapes count."""

    task: TaskName = "causal-lm"
    heads: tuple[str, ...] = ()  # modules that are new, and so are trained whole
    total_steps: int = 1  # optimizer steps of the run
    plan: BatchPlan | None = None  # training rows, for methods that look at them; None where only shapes count
    encode: Callable[[str], list[int]] | None = None  # a text's token ids, no special ones added
    originals: Callable[[], StateDict] | None = None  # the base's weights before they were quantised
