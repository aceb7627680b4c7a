"""axolotl's datasets: prompt types, fields of messages, roles and templates, as sources of a recipe. No torch."""

from typing import Any, NamedTuple

from lora_cli.convert.axolotl_prompts import PROMPTS, own_template
from lora_cli.convert.config import as_list, as_switch, known_values
from lora_cli.convert.draft import Draft
from lora_cli.convert.sources import NO_PATH, Source, carry_split, write_sources
from lora_cli.convert.tables import CACHE, OTHER_TASKS
from lora_cli.convert.templates import carry_template

# Types whose rows are no prompts, without what follows a `:` or a `.`, and the format here.
TYPES = {
    "sharegpt": "sharegpt",
    "sharegpt_simple": "sharegpt",
    "chat_template": "messages",
    "messages": "messages",
    "completion": "text",
    "pretrain": "text",
    "input_output": "segments",
}
OWN_TYPE = "a section"  # whose text the config has
DOCUMENTS = ("completion", "pretrain")
VICUNA = "without `conversation`, axolotl writes it in Vicuna's text (USER:, ASSISTANT:); accepted: the base's template"
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
INPUT_NOTE = "an input follows the instruction, without the words that axolotl writes around it"


class Kind(NamedTuple):
    """How axolotl writes the rows of a source."""

    name: str  # of its type
    template: str | None = None  # that writes the text of the type; None: that of the config
    has_input: bool = False  # whether it writes an input, with words of its own around it

    @property
    def is_document(self) -> bool:
        """Whether long rows are cut into several."""
        return self.name in DOCUMENTS


def carry_datasets(draft: Draft) -> list[Kind]:
    """Carry `datasets`, `test_datasets` and `pretraining_dataset`, and return the kinds of their sources."""
    config = draft.config
    kinds: list[Kind] = []
    for key, to in (("datasets", "data.train"), ("pretraining_dataset", "data.train"), ("test_datasets", "data.eval")):
        entries = config.get(key)
        if isinstance(entries, str) and entries:
            draft.put(to, entries, key)
            draft.carried(key, to, entries)
            draft.put("data.format", "text", key)
            kinds.append(Kind("pretrain"))
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
    _carry_loss(draft)
    return kinds


def _read_entry(draft: Draft, prefix: str, entry: dict[str, Any], *, pretrain: bool) -> tuple[Source, Kind]:
    source = Source(comment=prefix)
    entry = known_values(entry)
    _locate(draft, source, prefix, entry)
    written = entry.get("type") or ("pretrain" if pretrain else "")
    if isinstance(written, dict):
        kind = Kind(OWN_TYPE, _read_own_type(draft, source, f"{prefix}.type", written))
    else:
        kind = _read_type(draft, source, prefix, str(written).strip())
    _read_columns(draft, source, prefix, entry)
    _read_messages(draft, source, prefix, entry)
    _note_others(draft, prefix, entry)
    if weight := draft.config.number(f"{prefix}.weight"):
        source.values["weight"] = weight
        draft.carried(f"{prefix}.weight", "weight", weight)
    return source, kind


def _read_type(draft: Draft, source: Source, prefix: str, written: str) -> Kind:
    """Carry a prompt type, by its name in axolotl."""
    base = written.partition(":")[0].partition(".")[0]
    if prompt := PROMPTS.get(written):
        source.values["format"] = "alpaca"
        source.columns(**prompt.columns)
        draft.carried(f"{prefix}.type", "format", "alpaca")
        return Kind(written, prompt.template, prompt.has_input)
    if base in TYPES:
        source.values["format"] = TYPES[base]
        fixed = draft.config.has(f"{prefix}.conversation") or draft.config.get("chat_template") == "chatml"
        if base.startswith("sharegpt") and not fixed:
            draft.refuse(f"{prefix}.type", VICUNA)
        draft.carried(f"{prefix}.type", "format", TYPES[base])
    elif written:
        reason = "there is no prompt type of this name, with its words around the fields, here"
        draft.refuse(f"{prefix}.type", f"{reason}; accepted: format auto, in the chat template")
    return Kind(base)


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
    if not path:
        draft.missing(f"{prefix}.path", NO_PATH)
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


def _read_own_type(draft: Draft, source: Source, prefix: str, entry: dict[str, Any]) -> str | None:
    """Carry the fields of a prompt that the user wrote, and return the template of its text, if there can be one."""
    if any(key in entry for key in ("field_chosen", "field_rejected", "field_label")):
        draft.other_task(prefix, "pairs of good and bad answers are for preference training, which is another task")
        return None
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
        elif ours in ("input", "system"):
            source.columns(**{ours: None})  # axolotl reads no column that is not named
    template = own_template(entry)
    if entry.get("field_system") or not entry.get("system_format"):
        draft.no_effect(f"{prefix}.system_prompt", "is written by system_format, without field_system")
    for key in ("format", "no_input_format", "system_format", "system_prompt"):
        if template is not None:
            draft.carried(f"{prefix}.{key}", "data.chat_template", "a template with this text")
        draft.refuse(f"{prefix}.{key}", "no template writes this text around the fields; accepted: the chat template")
    return template


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
    draft.refuse(
        f"{prefix}.roles_to_train",
        "the assistant's turns carry loss; accepted: those",
        always=entry.get("roles_to_train") is not None,  # an empty list: no turn does
    )
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
    if not str(entry.get("type")).startswith("sharegpt"):
        draft.refuse(f"{prefix}.conversation", "the text of the rows is that of their type; accepted: that one")
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


def _carry_templates(draft: Draft, kinds: list[Kind]) -> None:
    """One template is for every source; a prompt type has its own."""
    config = draft.config
    conversations = [kind for kind in kinds if not kind.is_document and kind.name != "input_output"]
    prompts = [kind for kind in conversations if kind.template is not None]
    if prompts == conversations and len({kind.template for kind in prompts}) == 1:
        _write_prompts(draft, prompts)
    else:
        _carry_named_templates(draft)
        if prompts:
            draft.missing(
                f"datasets: type {prompts[0].name}",
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
        if str(entry.get("type")).startswith("sharegpt"):
            name = "conversation"  # of FastChat, under which it writes the turns
        if entry.get(name) is None:
            continue
        if first not in (None, entry[name]):
            draft.refuse(f"{prefix}.{name}", "one template is for all sources; accepted: the first")
            continue
        first = entry[name]
        carry_template(draft, f"{prefix}.{name}", model=model)


def _write_prompts(draft: Draft, kinds: list[Kind]) -> None:
    """Write rows in the text of their prompt type, in which the chat template of the config has no part."""
    kind = kinds[0].name
    note = f"; {INPUT_NOTE}" if any(each.has_input for each in kinds) else ""
    if kind == OWN_TYPE:
        draft.put("data.chat_template", kinds[0].template, "datasets: the text of type")
    else:
        draft.assume("data.chat_template", kinds[0].template, f"the text of the type {kind}{note}")
    names = ["chat_template", "chat_template_jinja"]
    names += [
        f"datasets[{index}].{name}" for index in range(len(as_list(draft.config.get("datasets")))) for name in names
    ]
    for name in names:
        draft.no_effect(name, f"rows of the type {kind} are written without it")


def _carry_loss(draft: Draft) -> None:
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
