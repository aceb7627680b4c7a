"""What a task is to transformers and PEFT: the class that loads a model for it, and the head that it may need anew."""

from typing import Any, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lora_cli.recipe.tasks import TaskName


class TaskInfo(NamedTuple):
    """One entry: how a base is loaded, and what its outputs are measured against."""

    loader: Any  # one of transformers' Auto classes
    peft: str  # PEFT's name of the task
    classes: bool  # the model has a head with one output for each label
    unit: str  # what the loss is a mean over


TASKS: dict[TaskName, TaskInfo] = {
    "causal-lm": TaskInfo(AutoModelForCausalLM, "CAUSAL_LM", False, "supervised token"),
    "seq2seq-lm": TaskInfo(AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", False, "target token"),
    "seq-cls": TaskInfo(AutoModelForSequenceClassification, "SEQ_CLS", True, "row"),
    "token-cls": TaskInfo(AutoModelForTokenClassification, "TOKEN_CLS", True, "word"),
}
