"""Facts of the run that adapter initialization needs, in addition to base model and adapter section."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.recipe.tasks import TaskName

StateDict = Mapping[str, Tensor]  # full name of a tensor → the tensor


class AdapterContext(NamedTuple):
    """The run that an adapter is created for; the defaults fit a causal LM if only shapes are needed."""

    task: TaskName = "causal-lm"
    heads: tuple[str, ...] = ()  # newly initialized modules, which are fully trained
    total_steps: int = 1  # optimizer steps of the run
    plan: BatchPlan | None = None  # training rows, for methods initialized from data; None if only shapes are needed
    encode: Callable[[str], list[int]] | None = None  # from a text to its token ids, without special tokens
    unquantized_weights: Callable[[], StateDict] | None = None  # returns the base's unquantized weights
