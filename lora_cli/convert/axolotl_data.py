"""axolotl's datasets: prompt types, fields of messages, roles and templates, as sources of a recipe. No torch."""

from typing import Any

from lora_cli.convert.config import as_list, as_switch, show
from lora_cli.convert.draft import Draft
from lora_cli.convert.sources import Source, carry_split, write_sources
from lora_cli.convert.tables import CACHE, OTHER_TASKS
from lora_cli.convert.templates import carry_template

# Prompt types, without what follows a `:` or a `.`: the format here, and its columns.
TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "alpaca": ("alpaca", {}),
    "alpaca_chat": ("alpaca", {}),
    "alpaca_instruct": ("alpaca", {}),
    "alpaca_w_system": ("alpaca", {}),
    "orcamini": ("alpaca", {}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "oasst": ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    "jeopardy": ("alpaca", {"instruction": "question", "input": "category", "output": "answer"}),
    "context_qa": ("alpaca", {"instruction": "question", "input": "context", "output": "answer"}),
    "sharegpt": ("sharegpt", {}),
    "sharegpt_simple": ("sharegpt", {}),
    "ultrachat": ("messages", {}),
    "chat_template": ("messages", {}),
    "messages": ("messages", {}),
    "completion": ("text", {}),
    "pretrain": ("text", {}),
    "input_output": ("segments", {}),
}
VARIANTS = {
    "alpaca_chat.load_qa": {"instruction": "question", "output": "answer"},
    "alpaca_chat.load_camel_ai": {"instruction": "message_1", "output": "message_2"},
    "alpaca_w_system.load_open_orca": {"instruction": "question", "system": "system_prompt", "output": "response"},
    "alpaca_w_system.load_open_orca_chatml": {
        "instruction": "question", "system": "system_prompt", "output": "response",
    },
    "context_qa.load_404": {"instruction": "question", "input": "context", "output": "answer"},
}  # fmt: skip
KEYS = (
    "path type split name data_files ds_type shards shards_idx preprocess_shards preprocess conversation chat_template "
    "chat_template_jinja input_format input_transform field field_human field_model field_messages field_tools "
    "field_system field_thinking template_thinking_key message_field_role message_field_content "
    "message_property_mappings message_field_training message_field_training_detail split_thinking logprobs_field "
    "temperature roles_to_train train_on_eos train_on_eot roles drop_system_message trust_remote_code revision "
    "train_on_inputs train_on_split text_column skip field_chosen field_rejected strip_whitespace skip_unsupported "
    "field_instruction field_input field_output field_format format no_input_format system_prompt system_format "
    "field_prompt field_completion field_label prompt_format completion_format chosen_format rejected_format weight "
    "step_separator max_completion_length train_on_last_step_only length sequence_length min_input_id max_input_id seed"
)
CHATML_PROMPT = "alpaca (ChatML)"  # types such as alpaca_w_system.load_open_orca_chatml
ALPACA_NOTE = "in Alpaca's text, as there; an input follows the instruction, without its own heading"


def carry_datasets(draft: Draft) -> None:
    """Carry `datasets`, `test_datasets` and `pretraining_dataset`."""
    config = draft.config
    kinds: list[str] = []
    for key, to in (("datasets", "data.train"), ("pretraining_dataset", "data.train"), ("test_datasets", "data.eval")):
        entries = config.get(key)
        if isinstance(entries, str) and entries:
            draft.put(to, entries, key)
            draft.carried(key, to, entries)
            draft.put("data.format", "text", key)
            kinds.append("pretrain")
            continue
        sources = []
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                source, kind = _read_entry(draft, f"{key}[{index}]", entry, pretrain=key == "pretraining_dataset")
                sources.append(source)
                kinds.append(kind)
        if sources:
            write_sources(draft, to, sources)
    if "data.train" not in draft.values:
        draft.missing("datasets", "the config has no datasets; accepted: data/train.jsonl")
        draft.put("data.train", "data/train.jsonl", "replace: the config has no datasets")
    _carry_templates(draft, kinds)
    _carry_loss(draft, kinds)


def _read_entry(draft: Draft, prefix: str, entry: dict[str, Any], *, pretrain: bool) -> tuple[Source, str]:
    source = Source(comment=prefix)
    _locate(draft, source, prefix, entry)
    written = entry.get("type") or ("pretrain" if pretrain else "")
    if isinstance(written, dict):
        kind = "user-defined"
        _read_own_type(draft, source, f"{prefix}.type", written)
    else:
        kind = str(written).partition(":")[0].partition(".")[0].strip()
        if kind in TYPES:
            ours, columns = TYPES[kind]
            source.values["format"] = ours
            source.columns(**{**columns, **VARIANTS.get(str(written).partition(":")[0], {})})
            if kind.startswith("alpaca") and str(written).endswith("chatml"):
                kind = CHATML_PROMPT
            elif kind == "alpaca_chat" or (kind.startswith("alpaca") and ":" in str(written)):
                reason = "writes its own words around the fields (USER:, ASSISTANT:); accepted: Alpaca's text"
                draft.refuse(f"{prefix}.type", reason)
            draft.carried(f"{prefix}.type", "format", ours)
        elif written:
            draft.refuse(f"{prefix}.type", f"there is no prompt type {show(written)} here; accepted: format auto")
    _read_columns(draft, source, prefix, entry)
    _read_messages(draft, source, prefix, entry)
    _note_others(draft, prefix, entry)
    if weight := draft.config.number(f"{prefix}.weight"):
        source.values["weight"] = weight
        draft.carried(f"{prefix}.weight", "weight", weight)
    return source, kind


def _locate(draft: Draft, source: Source, prefix: str, entry: dict[str, Any]) -> None:
    path, files = str(entry.get("path") or ""), [str(each) for each in as_list(entry.get("data_files"))]
    kind = str(entry.get("ds_type") or "")
    if path in ("json", "csv", "parquet", "text", "arrow") and files:  # builders of `datasets`
        draft.carried(f"{prefix}.path", "path", files[0], "the file's name says its type")
        path = files[0]
    elif files:
        local = path.startswith((".", "/", "~"))
        draft.carried(f"{prefix}.path", "path", path)
        path = f"{path.rstrip('/')}/{files[0]}" if local else f"hf://datasets/{path}/{files[0]}"
    else:
        draft.carried(f"{prefix}.path", "path", path)
    source.values["path"] = path or "data/train.jsonl"
    if len(files) > 1:
        draft.refuse(f"{prefix}.data_files", "a source has one path: write one for each file; accepted: the first")
    draft.carried(f"{prefix}.data_files", "path", path)
    draft.no_effect(f"{prefix}.ds_type", f"the file's name says its type ({kind})")
    if entry.get("name"):
        source.values["subset"] = str(entry["name"])
        draft.carried(f"{prefix}.name", "subset", str(entry["name"]))
    for key in ("split", "train_on_split"):
        if not entry.get(key):
            continue
        if refused := carry_split(draft, f"{prefix}.{key}", source, str(entry[key])):
            draft.refuse(f"{prefix}.{key}", refused)
        draft.carried(f"{prefix}.{key}", "split", source.values.get("split"))
    if kind == "synthetic" or path == "synthetic":
        draft.other_task(f"{prefix}.path", "random tokens teach nothing")


def _read_own_type(draft: Draft, source: Source, prefix: str, entry: dict[str, Any]) -> None:
    """Carry the fields of a prompt that the user wrote; its text is not offered."""
    if any(key in entry for key in ("field_chosen", "field_rejected", "field_label")):
        draft.other_task(prefix, "pairs of good and bad answers are for preference training, which is another task")
        return
    source.values["format"] = "alpaca"
    for key, ours in (
        ("field_instruction", "instruction"),
        ("field_input", "input"),
        ("field_output", "output"),
        ("field_system", "system"),
    ):
        if entry.get(key):
            source.columns(**{ours: str(entry[key])})
            draft.carried(f"{prefix}.{key}", f"columns.{ours}", entry[key])
    plain = {"{instruction}", "{instruction} {input}", "{instruction}\n{input}"}
    for key in ("format", "no_input_format", "system_prompt", "system_format"):
        text = entry.get(key)
        if text in plain or (key == "system_format" and text == "{system}"):
            draft.same(f"{prefix}.{key}", "what the format alpaca does, inside the chat template")
        draft.refuse(f"{prefix}.{key}", "the text around the fields is the chat template's; accepted: that one")


def _read_columns(draft: Draft, source: Source, prefix: str, entry: dict[str, Any]) -> None:
    ours = str(source.values.get("format", "auto"))
    main = {"text": "text", "messages": "messages", "sharegpt": "conversations", "segments": "segments"}.get(ours, "")
    for key, column in (
        ("field_messages", main),
        ("field", "text"),
        ("text_column", "text"),
        ("field_tools", "tools"),
        ("field_system", "system"),
    ):
        value = entry.get(key)
        if not value or not column:
            continue
        if ours == "text" and column in ("tools", "system"):
            draft.no_effect(f"{prefix}.{key}", "documents have no such column")
            continue
        source.columns(**{column: str(value)})
        draft.carried(f"{prefix}.{key}", f"columns.{column}", value)


def _read_messages(draft: Draft, source: Source, prefix: str, entry: dict[str, Any]) -> None:
    mappings = entry.get("message_property_mappings")
    fields = dict(mappings) if isinstance(mappings, dict) else {}
    for key, ours in (("message_field_role", "role"), ("message_field_content", "content")):
        if entry.get(key):
            fields[ours] = entry[key]
            draft.carried(f"{prefix}.{key}", f"message_fields.{ours}", entry[key])
    if entry.get("field_thinking"):
        fields["reasoning_content"] = entry["field_thinking"]
        draft.carried(f"{prefix}.field_thinking", "message_fields.reasoning_content", entry["field_thinking"])
    known = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    for ours, theirs in fields.items():
        name = f"{prefix}.message_property_mappings.{ours}"
        if ours not in known:
            draft.no_effect(name, "keys of a message that the chat template reads are passed on under their own name")
            continue
        source.message_fields(**{ours: str(theirs)})
        draft.carried(name, f"message_fields.{ours}", theirs)
    roles = entry.get("roles")
    for role, names in (roles if isinstance(roles, dict) else {}).items():
        if role not in ("user", "assistant", "system", "tool", "developer"):
            draft.refuse(f"{prefix}.roles.{role}", "is not a role of chat templates here; accepted: without it")
            continue
        source.roles(role, *map(str, as_list(names)))
        draft.carried(f"{prefix}.roles.{role}", "roles", names)
    trained = [str(name).lower() for name in as_list(entry.get("roles_to_train"))]
    if trained and set(trained) <= {"assistant", "gpt", "model"}:
        draft.same(f"{prefix}.roles_to_train", "the assistant's turns carry loss")
    draft.refuse(f"{prefix}.roles_to_train", "the assistant's turns carry loss; accepted: those")
    for key in ("train_on_eos", "train_on_eot"):
        if str(entry.get(key)).lower() in ("turn", "true"):
            draft.same(f"{prefix}.{key}", "the end of an answer carries loss")
        draft.refuse(
            f"{prefix}.{key}", "the end of each answer carries loss; accepted: so", always=entry.get(key) is not None
        )
    if entry.get("message_field_training") in ("train", "training", "weight", "loss"):
        draft.same(f"{prefix}.message_field_training", "the flag of a turn is read")
    draft.refuse(
        f"{prefix}.message_field_training", "flags of turns are train, training, weight, loss; accepted: those"
    )
    if entry.get("message_field_training_detail") in ("train_detail", "training_detail"):
        draft.same(f"{prefix}.message_field_training_detail", "the detail of a turn is read")
    draft.refuse(f"{prefix}.message_field_training_detail", "train_detail of a turn is read; accepted: that")


def _note_others(draft: Draft, prefix: str, entry: dict[str, Any]) -> None:
    for key in ("preprocess", "preprocess_shards", "trust_remote_code", "skip_unsupported", "strip_whitespace"):
        draft.no_effect(f"{prefix}.{key}", CACHE)
    if str(entry.get("conversation", "chatml")) == "chatml" and "chat_template" not in draft.config.values:
        draft.same(
            f"{prefix}.conversation",
            "the chat template of the base; write data.chat_template: chatml for a base without one",
        )
    draft.refuse(f"{prefix}.conversation", "the conversation is written by the chat template; accepted: the base's own")
    draft.same(f"{prefix}.template_thinking_key", "reasoning is passed to the template under the name that it reads")
    draft.same(f"{prefix}.split_thinking", "reasoning within an answer is passed on as the template expects it")
    for key in ("shards", "shards_idx"):
        draft.refuse(f"{prefix}.{key}", "max_rows counts rows: a share of them has no key; accepted: all rows")
    draft.refuse(f"{prefix}.revision", "a hub dataset is read at its main revision; accepted: that")
    draft.refuse(f"{prefix}.skip", "rows are read from the first; accepted: all rows")
    draft.refuse(f"{prefix}.drop_system_message", "system messages are kept; accepted: kept")
    draft.refuse(f"{prefix}.input_format", "the text around the fields is the chat template's; accepted: that one")
    draft.refuse(f"{prefix}.input_transform", "rows are read as they are; accepted: so")
    for key in ("field_chosen", "field_rejected", "field_prompt", "field_completion", "field_label"):
        if not draft.config.text("rl") and entry.get(key):
            draft.other_task(
                f"{prefix}.{key}", "good and bad answers are for preference training, which is another task"
            )
        draft.no_effect(f"{prefix}.{key}", OTHER_TASKS)
    for key in ("logprobs_field", "temperature", "field_human", "field_model"):
        draft.refuse(f"{prefix}.{key}", "is not read here; accepted: without it")


def _carry_templates(draft: Draft, kinds: list[str]) -> None:
    """One template is for every source; Alpaca's text stands for the prompt type alpaca."""
    config = draft.config
    prompts = [kind for kind in kinds if kind.startswith("alpaca") or kind in ("gpteacher", "oasst", "orcamini")]
    conversations = [kind for kind in kinds if kind not in ("completion", "pretrain", "input_output")]
    texts = {"chatml" if kind == CHATML_PROMPT else "alpaca" for kind in prompts}
    if prompts and prompts == conversations and len(texts) == 1:
        _write_prompts(draft, texts.pop(), prompts[0])
    else:
        _carry_named_templates(draft)
        if prompts:
            draft.missing(
                f"datasets: type {prompts[0]}",
                "one template is for all sources, and other sources are written in another way; accepted: "
                "chat_template, or the tokenizer's own",
            )
    variables = config.get("chat_template_kwargs")
    if isinstance(variables, dict) and variables:
        draft.carry("chat_template_kwargs", "data.template_variables", variables)


def _carry_named_templates(draft: Draft) -> None:
    config, model = draft.config, draft.config.text("base_model")
    key = "chat_template_jinja" if config.text("chat_template_jinja") else "chat_template"
    if key == "chat_template_jinja":
        draft.same("chat_template", "chat_template_jinja has it")
    carry_template(draft, key, model=model)
    first = config.get(key)
    for index, entry in enumerate(as_list(config.get("datasets"))):
        if not isinstance(entry, dict):
            continue
        prefix = f"datasets[{index}]"
        name = "chat_template_jinja" if entry.get("chat_template_jinja") else "chat_template"
        if name == "chat_template_jinja":
            draft.same(f"{prefix}.chat_template", "chat_template_jinja has it")
        if entry.get(name) is None:
            continue
        if first not in (None, entry[name]):
            draft.refuse(f"{prefix}.{name}", "one template is for all sources; accepted: the first")
            continue
        first = entry[name]
        carry_template(draft, f"{prefix}.{name}", model=model)


def _write_prompts(draft: Draft, text: str, kind: str) -> None:
    """Write rows in the text of their prompt type, in which the chat template of the config has no part."""
    if text == "alpaca":
        draft.assume("data.chat_template", text, f"the type {kind}: rows are written {ALPACA_NOTE}")
    else:
        draft.assume("data.chat_template", text, f"the type {kind}")
    names = ["chat_template", "chat_template_jinja"]
    names += [
        f"datasets[{index}].{name}" for index in range(len(as_list(draft.config.get("datasets")))) for name in names
    ]
    for name in names:
        draft.no_effect(name, f"rows of the type {kind} are written without it")


def _carry_loss(draft: Draft, kinds: list[str]) -> None:
    config = draft.config
    entries = [entry for entry in as_list(config.get("datasets")) if isinstance(entry, dict)]
    wanted = [as_switch(entry.get("train_on_inputs")) for entry in entries]
    everything = config.switch("train_on_inputs")
    if everything or any(wanted):
        draft.put("data.loss_on", "all", "train_on_inputs")
    draft.carried("train_on_inputs", "data.loss_on", "all" if everything else "assistant")
    for index, value in enumerate(wanted):
        name = f"datasets[{index}].train_on_inputs"
        if value and not all(wanted):
            draft.refuse(name, "data.loss_on applies to all sources; accepted: loss on all")
        draft.carried(name, "data.loss_on", "all" if value else "assistant")
