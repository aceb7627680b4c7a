"""The tasks that a model can be trained for, and the dataset formats of each. No torch."""

from typing import Literal

TaskName = Literal["causal-lm", "seq-cls", "token-cls", "seq2seq-lm"]
FormatName = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "query-response",
    "prompt-completion",
    "text",
    "segments",
    "tokens",
    "classification",
    "tagging",
]

EVERY_TASK: tuple[TaskName, ...] = ("causal-lm", "seq-cls", "token-cls", "seq2seq-lm")
# The dataset formats that each task can be trained on.
TASK_FORMATS: dict[TaskName, tuple[FormatName, ...]] = {
    "causal-lm": (
        "messages",
        "sharegpt",
        "alpaca",
        "query-response",
        "prompt-completion",
        "text",
        "segments",
        "tokens",
    ),
    "seq-cls": ("classification",),
    "token-cls": ("tagging",),
    "seq2seq-lm": ("prompt-completion",),
}
