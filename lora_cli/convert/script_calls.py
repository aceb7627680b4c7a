"""What a TRL or unsloth script does with its rows and calls, in lines of the report. No torch."""

import re
from collections.abc import Mapping

from lora_cli.convert.config import Unreadable
from lora_cli.convert.draft import Draft
from lora_cli.convert.script_rows import FIELD, STANDARDIZE
from lora_cli.convert.tables import OWN_TOKENIZER
from lora_cli.convert.templates import prompt_template

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
    "add_callback": "is called in training, and may change it; accepted: without it",
    "requires_grad_": "changes which weights are trained; accepted: the adapter's",
}
# Attributes that have no part in what is learnt, and options of a tokenizer.
HARMLESS = (
    "padding_side", "pad_token", "pad_token_id", "use_cache", "pretraining_tp", "is_parallelizable", "model_parallel",
    "model_max_length", "add_eos_token", "gradient_checkpointing",
)  # fmt: skip
TOKENIZER_OPTIONS = (
    *HARMLESS, "use_fast", "legacy", "trust_remote_code", "token", "use_auth_token", "cache_dir", "local_files_only",
    "revision", "truncation_side",
)  # fmt: skip
CAUSAL = ("CAUSAL_LM", "NONE", "")
PADDING_COLLATORS = (
    "DataCollatorForSeq2Seq", "DataCollatorForLanguageModeling", "DataCollatorWithPadding", "default_data_collator",
    "DataCollatorWithFlattening", "DefaultDataCollator",
)  # fmt: skip
ONE_RUN = "the script does this more than once, and a recipe is one run"
ALPACA_REQUEST = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
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
    _carry_map(draft)
    for key in config.values:
        if ", line " in key:
            what = "max_rows is set once, for the rows of training" if key.startswith("select") else ONE_RUN
            draft.refuse(key, f"{what}; accepted: without this one")
    for key in config.names("after training"):
        draft.no_effect(f"after training.{key}", "is called after training")
    for name in config.names("calls"):
        draft.refuse(
            f"calls.{name}", CALLS.get(name.partition(" again")[0], "changes the model in code; accepted: without it")
        )
    for key, value in config.leaves():
        if key.startswith("set.") and key != "set.chat_template":
            _carry_attribute(draft, key, value)
    _carry_tokenizer(draft)
    for name in STANDARDIZE:
        draft.same(f"dataset.{name}", "names of keys and roles are read as they are")
    for name in ("shuffle", "sort"):
        draft.no_effect(f"dataset.{name}", "training.seed sets the order of rows")
    draft.same("dataset.remove_columns", "the columns of the row format are read", computed=True)
    for name in config.names("dataset"):
        if name != "select":
            draft.refuse(f"dataset.{name}", f"changes the rows in code: write them to a file; {ROWS_AS_STORED}")
    draft.refuse("eval_dataset", "its rows are chosen in code: write data.eval; accepted: no evaluation")


def _carry_attribute(draft: Draft, key: str, value: object) -> None:
    """Add the line of an attribute that is set after its object was created."""
    if key.rpartition(".")[2] in HARMLESS:
        draft.no_effect(key, "padding, caches and memory")
    elif ".args." in key or isinstance(value, Unreadable) or "config" in key:
        reason = "is set after it was created: write it into the call; accepted: the call's value"
        draft.refuse(key, reason, always=True)
    else:
        draft.refuse(key, "changes the model or its tokenizer in code; accepted: as they are loaded", always=True)


def _carry_tokenizer(draft: Draft) -> None:
    """Add the lines of a tokenizer that the script loads: here it is that of the base."""
    config = draft.config
    options = config.get("AutoTokenizer") or {}
    base = [config.raw(key) for key in ("pretrained_model_name_or_path", "model_name_or_path", "model_name")]
    if options.get("path") in (None, *base):
        draft.same("AutoTokenizer.path", OWN_TOKENIZER, computed=True)
    draft.refuse("AutoTokenizer.path", "the tokenizer of the base is used; accepted: that one")
    for option in options:
        if option in TOKENIZER_OPTIONS:
            draft.no_effect(f"AutoTokenizer.{option}", OWN_TOKENIZER)
        draft.refuse(f"AutoTokenizer.{option}", "the tokenizer of the base is used as it is; accepted: so", always=True)


def carry_task(draft: Draft) -> None:
    """Add the lines of PEFT's task type: only causal-lm is converted."""
    for key in ("task_type", "lora_task_type"):
        task = str(draft.config.raw(key) or "").rpartition(".")[2].upper()
        if task in CAUSAL:
            draft.same(key, "causal-lm is the default", computed=True)
        elif re.fullmatch(r"SEQ_CLS|TOKEN_CLS|QUESTION_ANS|SEQ_2_SEQ_LM|FEATURE_EXTRACTION", task):
            reason = f"{task} is another task than predicting the next token, and only that is converted"
            draft.other_task(key, reason, computed=True)
        else:
            draft.refuse(key, "only causal-lm is converted; accepted: causal-lm")


def carry_collator(draft: Draft) -> bool:
    """Add the line of the data collator, and return whether it decides which tokens carry loss."""
    written = str(draft.config.raw("data_collator") or "")
    name = re.split(r"\(", written)[0].rpartition(".")[2]
    if name == "DataCollatorForCompletionOnlyLM":
        if draft.config.get("dataset_text_field") and not facts_of_map(draft):
            draft.refuse("data_collator", "texts have no turns, whose answers carry loss; accepted: loss on all of it")
            return False
        last = "instruction_template" not in written and facts_of_map(draft).get("map") != "prompt"
        loss_on = "last-turn" if last else "assistant"
        note = "without instruction_template, only the last answer carries loss" if last else "loss on the answers"
        draft.put("data.loss_on", loss_on, f"data_collator; {note}")
        draft.carried("data_collator", "data.loss_on", loss_on, note, computed=True)
        return True
    if name in PADDING_COLLATORS:
        draft.no_effect("data_collator", "how rows are put into a batch")
    draft.refuse("data_collator", "may decide which tokens carry loss; accepted: data.loss_on decides")
    return False


def facts_of_map(draft: Draft) -> Mapping[str, str]:
    """Return what is known of the function that writes the text of rows; nothing if it is other code, or none."""
    return next((facts for facts in draft.config.facts.values() if facts["map"] != "code"), {})


def prompt_columns(facts: Mapping[str, str]) -> dict[str, str | None]:
    """Return the columns of rows that a function writes in a prompt: those that it reads, in its order."""
    names = facts["columns"].split(",")
    ours = ("instruction", "output") if len(names) == 2 else ("instruction", "input", "output")
    return {"input": None, **dict(zip(ours, names, strict=True))}


def _carry_map(draft: Draft) -> None:
    """Add the lines of functions that rows are mapped by; one can write the text of a conversation or a prompt."""
    written = facts_of_map(draft)
    for key, facts in draft.config.facts.items():
        if facts is not written:
            continue
        if facts["map"] == "chat_template" and facts["options"]:
            reason = f"gives the chat template {facts['options']}: write data.template_variables; accepted: without it"
            draft.refuse(key, reason)
        elif facts["map"] == "chat_template":
            draft.same(key, f"the chat template renders {facts['column']} here, too", computed=True)
        else:
            _carry_prompt(draft, key, facts["prompt"])
    draft.refuse("dataset.map", f"makes rows in code: write them to a file; {ROWS_AS_STORED}")


def _carry_prompt(draft: Draft, key: str, prompt: str) -> None:
    """Write the prompt as a chat template; of two fields before the answer, nothing can be written between."""
    texts = FIELD.split(prompt)
    before, answer, after = texts[0], texts[-2], texts[-1]
    note = "an input follows the instruction, without the words between them" if len(texts) == 4 else ""
    alpaca = (before, answer.strip("\n"), after) == (f"{ALPACA_REQUEST}### Instruction:\n", "### Response:", "")
    template = "alpaca" if alpaca else prompt_template("{}", f"{before}{{}}", answer, after=after)
    draft.put("data.chat_template", template, f"{key}: its prompt")
    draft.carried(key, "data.chat_template", "alpaca" if alpaca else "a template with this text", note, computed=True)
