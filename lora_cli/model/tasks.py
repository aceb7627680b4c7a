"""Table of tasks: the Auto class of transformers that loads the model, PEFT's task type, the unit of the loss."""

from typing import Any, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from lora_cli.recipe.tasks import TaskName


class TaskInfo(NamedTuple):
    """How a base is loaded for one task, and the unit that its loss is averaged over."""

    auto_class: Any  # transformers' Auto class that loads the model
    architectures: Any  # transformers' mapping from config classes to the model classes of the task
    task_type: str  # PEFT's name of the task
    is_classification: bool  # the model has a head with one output for each label
    unit: str  # the loss is the mean over these


TASKS: dict[TaskName, TaskInfo] = {
    "causal-lm": TaskInfo(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "CAUSAL_LM", False, "supervised token"),
    "seq2seq-lm": TaskInfo(
        AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, "SEQ_2_SEQ_LM", False, "target token"
    ),
    "seq-cls": TaskInfo(
        AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "SEQ_CLS", True, "row"
    ),
    "token-cls": TaskInfo(
        AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, "TOKEN_CLS", True, "word"
    ),
}
