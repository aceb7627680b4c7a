"""What a TRL or unsloth script does with its rows and calls, in lines of the report. No torch."""

import re

from lora_cli.convert.draft import Draft
from lora_cli.convert.python_script import STANDARDIZE

SCRIPT_KEYS = (
    "trainer dataset dataset.map dataset.filter dataset.select dataset.shuffle dataset.train_test_split "
    "dataset.rename_column dataset.rename_columns dataset.remove_columns dataset.take dataset.skip dataset.sort "
    "dataset.shard instruction_part response_part eval_dataset args model tokenizer train_dataset peft_config "
    "data_collator quantization_config " + " ".join(f"dataset.{name}" for name in STANDARDIZE)
)
# What the calls do that change the model or the tokenizer, and what is done instead.
CALLS = {
    "setup_chat_format": "adds ChatML's tokens and template: write model.new_tokens and data.chat_template: chatml; "
    "accepted: the base as it is",
    "PeftModel": "goes on training an adapter: write adapter.from; accepted: a new adapter",
    "add_special_tokens": "adds tokens: write model.new_tokens; accepted: the tokens of the base",
    "add_tokens": "adds tokens: write model.new_tokens; accepted: the tokens of the base",
    "add_new_tokens": "adds tokens: write model.new_tokens; accepted: the tokens of the base",
    "resize_token_embeddings": "changes the embeddings: write model.new_tokens; accepted: those of the base",
}
CAUSAL = ("CAUSAL_LM", "NONE", "")
PADDING_COLLATORS = (
    "DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DataCollatorWithPadding", "default_data_collator",
    "DataCollatorWithFlattening", "DefaultDataCollator",
)  # fmt: skip
ONE_RUN = "the script does this twice, and a recipe is one run"
ROWS_AS_STORED = "accepted: rows as they are stored"


def carry_script(draft: Draft) -> None:
    """Add the lines of a script's calls; nothing for a config or a command line."""
    config = draft.config
    if config.kind != "script":
        return
    if trainer := config.get("trainer"):
        draft.other_task("trainer", f"{trainer} is another task: `lora train` does supervised fine-tuning")
    if isinstance(config.get("model"), str):
        draft.carry("model", "model.path", config.get("model"))
    for key in config.values:
        if ", line " in key:
            what = "max_rows is set once, for the rows of training" if key.startswith("select") else ONE_RUN
            draft.refuse(key, f"{what}; accepted: the first")
    for name, reason in CALLS.items():
        draft.refuse(f"calls.{name}", reason)
    for key, _ in config.leaves():
        if key.startswith("set.") and key != "set.chat_template":
            draft.refuse(
                key, "is set after it was created: write it into the call; accepted: the call's value", always=True
            )
    _carry_map(draft)
    for name in STANDARDIZE:
        draft.same(f"dataset.{name}", "names of keys and roles are read as they are")
    draft.no_effect("dataset.shuffle", "training.seed sets the order of rows")
    draft.same("dataset.remove_columns", "the columns of the row format are read")
    for name in ("filter", "take", "skip", "shard", "rename_column", "rename_columns", "train_test_split"):
        draft.refuse(f"dataset.{name}", f"changes the rows in code: write them to a file; {ROWS_AS_STORED}")
    draft.no_effect("dataset.sort", "training.seed sets the order of rows")
    draft.refuse("eval_dataset", "its rows are chosen in code: write data.eval; accepted: no evaluation")


def carry_task(draft: Draft) -> None:
    """Add the lines of PEFT's task type: only causal-lm is converted."""
    for key in ("task_type", "lora_task_type"):
        task = str(draft.config.raw(key) or "").rpartition(".")[2].upper()
        if task in CAUSAL:
            draft.same(key, "causal-lm is the default")
        elif re.fullmatch(r"SEQ_CLS|TOKEN_CLS|QUESTION_ANS|SEQ_2_SEQ_LM|FEATURE_EXTRACTION", task):
            draft.other_task(key, f"{task} is another task than predicting the next token, and only that is converted")
        else:
            draft.refuse(key, "only causal-lm is converted; accepted: causal-lm")


def carry_collator(draft: Draft) -> bool:
    """Add the line of the data collator, and return whether it decides which tokens carry loss."""
    written = str(draft.config.raw("data_collator") or "")
    name = re.split(r"\(", written)[0].rpartition(".")[2]
    if name == "DataCollatorForCompletionOnlyLM":
        if draft.config.get("dataset_text_field") and not draft.config.facts:
            draft.refuse("data_collator", "texts have no turns, whose answers carry loss; accepted: loss on all of it")
            return False
        last = "instruction_template" not in written and draft.config.facts.get("map") != "alpaca"
        loss_on = "last-turn" if last else "assistant"
        note = "without instruction_template, only the last answer carries loss" if last else "loss on the answers"
        draft.put("data.loss_on", loss_on, f"data_collator; {note}")
        draft.carried("data_collator", "data.loss_on", loss_on, note, computed=True)
        return True
    if name in PADDING_COLLATORS:
        draft.no_effect("data_collator", "how rows are put into a batch")
    draft.refuse("data_collator", "may decide which tokens carry loss; accepted: data.loss_on decides")
    return False


def alpaca_columns(draft: Draft) -> dict[str, str]:
    """Return the columns of rows that a function writes in Alpaca's prompt: those that it reads, in its order."""
    names = [name for name in draft.config.facts.get("columns", "").split(",") if name]
    ours = {2: ("instruction", "output"), 3: ("instruction", "input", "output")}.get(len(names), ())
    return dict(zip(ours, names, strict=False))


def _carry_map(draft: Draft) -> None:
    config = draft.config
    match config.facts.get("map"):
        case "chat_template":
            column = config.facts.get("column", "")
            draft.same("dataset.map", f"the chat template renders {column or 'the conversations'} here, too")
        case "alpaca":
            draft.put("data.chat_template", "alpaca", "dataset.map: Alpaca's prompt")
            note = "Alpaca's prompt; an input follows the instruction, without a heading of its own"
            draft.carried("dataset.map", "data.chat_template", "alpaca", note, computed=True)
        case _:
            draft.refuse("dataset.map", f"makes rows in code: write them to a file; {ROWS_AS_STORED}")
