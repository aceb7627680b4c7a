"""Table of tasks: the Auto class of transformers that loads the model, PEFT's task type, the unit of the loss."""

import inspect
from typing import Any, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
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

# Language models that attend to their whole prompt in both directions.
PREFIX_MODELS = {"paligemma"}


def auto_class(config: PretrainedConfig, task: TaskName) -> Any:
    """Return transformers' Auto class that loads a model of `config` for `task`.

    A multimodal model is loaded in full, with its towers, although text passes through its decoder alone: then the
    names of an adapter and of a merged model are those that PEFT, vLLM and the published checkpoint use.
    """
    if task == "causal-lm" and not (_is_listed(config, task) and not _is_text_part(config)):
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return AutoModelForImageTextToText
        if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
            return AutoModelForMultimodalLM
    return TASKS[task].auto_class


def _is_text_part(config: PretrainedConfig) -> bool:
    """Return whether transformers' causal-lm class of a multimodal `config` is a model of its text decoder alone."""
    text_config_class = config.sub_configs.get("text_config")
    if text_config_class is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    return bool(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class is text_config_class)


def is_supported(config: PretrainedConfig, task: TaskName) -> bool:
    """Return whether transformers, or the model's repository, has a class of this architecture for `task`."""
    if _is_listed(config, task):
        return True
    if task != "causal-lm" or config.is_encoder_decoder or type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return False
    # Some classes only combine others, such as a model that listens with one that speaks, and cannot be trained.
    model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
    return "input_ids" in inspect.signature(model_class.forward).parameters


def _is_listed(config: PretrainedConfig, task: TaskName) -> bool:
    remote_classes = getattr(config, "auto_map", None) or {}
    return type(config) in TASKS[task].architectures or TASKS[task].auto_class.__name__ in remote_classes
