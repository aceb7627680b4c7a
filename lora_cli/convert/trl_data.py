"""TRL's datasets: one of the hub or of files, its splits, and mixtures of several. No torch."""

from typing import Any

from lora_cli.convert.config import as_list, as_number, known_values
from lora_cli.convert.draft import Draft
from lora_cli.convert.huggingface import carry_eval_fraction
from lora_cli.convert.script_calls import ROWS_AS_STORED, facts_of_map, prompt_columns
from lora_cli.convert.sources import NO_PATH, Source, carry_split, write_sources

DATA_KEYS = (
    "dataset_name dataset_path dataset_config dataset_subset dataset_train_split dataset_test_split dataset_text_field "
    "dataset_split datasets datasets.path datasets.id datasets.name datasets.config datasets.split datasets.columns "
    "datasets.data_dir datasets.data_files datasets.weight dataset_mixture dataset_mixture.datasets "
    "dataset_mixture.test_split_size dataset_mixture.seed test_split_size splits load_dataset dataset_mixer "
    "dataset_splits dataset_configs train_file data_files ignore_bias_buffers"
)
BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of the library datasets: they read data_files


def carry_rows(draft: Draft) -> None:
    """Carry the rows of training and evaluation."""
    config = draft.config
    prefix = next((name for name in ("dataset_mixture.datasets", "datasets") if config.get(name)), "")
    sources: list[Source] = []
    if prefix:
        entries = config.get(prefix)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                sources.append(_read_entry(draft, f"{prefix}[{index}]", entry))
        _carry_mixture(draft)
    elif isinstance(mixer := config.get("dataset_mixer"), dict):
        for name, share in mixer.items():
            weight = as_number(share)
            if weight is None:
                raise config.error("dataset_mixer", "not a number for each dataset")
            sources.append(Source({"path": str(name), "weight": weight}, "dataset_mixer"))
        draft.carried("dataset_mixer", "data.train", list(mixer))
    else:
        sources = _single(draft)
    column, facts = config.get("dataset_text_field"), facts_of_map(draft)
    if config.get("chat_template_format") or facts:
        draft.same("dataset_text_field", "the script writes the row's text into it", computed=True)
    elif isinstance(column, str) and column not in ("text", "messages", ""):
        for source in sources:
            source.values["format"] = "text"
            source.columns(text=column)
        draft.carried("dataset_text_field", "columns.text", column)
    if facts.get("map") == "prompt":
        for source in sources:
            source.values["format"] = "alpaca"
            source.columns(**prompt_columns(facts))
    elif facts.get("column", "messages") not in ("messages", "conversations"):
        for source in sources:
            source.values["format"] = "messages"
            source.columns(messages=facts["column"])
    draft.same("dataset_text_field", "the column of texts has this name; conversations have none")
    draft.refuse("dataset.select", f"changes the rows in code: write them to a file; {ROWS_AS_STORED}")
    if sources:
        write_sources(draft, "data.train", sources)
    if "data.train" not in draft.values:
        if config.get("dataset_name") in (None, ""):
            draft.missing("dataset_name", "the rows are not named; accepted: data/train.jsonl")
        draft.put("data.train", "data/train.jsonl", "replace: the rows are not named")
    _carry_eval(draft)


def _single(draft: Draft) -> list[Source]:
    config = draft.config
    key = next((name for name in ("dataset_name", "dataset_path", "train_file") if config.get(name)), "")
    if not key:
        return []
    source = Source({"path": str(config.get(key))}, key)
    files = config.get("data_files")
    if isinstance(files, dict):
        files = files.get("train")
    names = [str(each) for each in as_list(files)]
    if names and source.values["path"] in BUILDERS:
        source.values["path"] = names[0]
        draft.carried("data_files", "data.train", names[0])
    if len(names) > 1 or (names and source.values["path"] != names[0]):
        draft.refuse("data_files", "a source has one path: write one for each file; accepted: the first")
    draft.carried(key, "data.train", source.values["path"])
    for name in ("dataset_config", "dataset_subset"):
        if value := config.get(name):
            source.values["subset"] = str(value)
            draft.carried(name, "subset", str(value))
    for name in ("dataset_train_split", "dataset_split"):
        split = config.get(name)
        if split is None:
            continue
        if split == "train":
            draft.same(name, "train is the default")
        else:
            if refused := carry_split(draft, name, source, str(split)):
                draft.refuse(name, refused)
            draft.carried(name, "split", source.values.get("split"))
    splits = as_list(config.get("splits"))
    if splits:
        source.values["split"] = str(splits[0])
        draft.carried("splits", "split", source.values["split"])
    rows = config.get("dataset.select")
    if isinstance(rows, int) and not isinstance(rows, bool):
        source.values["max_rows"] = min(rows, source.values.get("max_rows", rows))
        note = "the first rows, not a random sample" if config.is_written("dataset.shuffle") else ""
        draft.carried("dataset.select", "max_rows", source.values["max_rows"], note)
    return [source]


def _read_entry(draft: Draft, prefix: str, entry: dict[str, Any]) -> Source:
    source, entry = Source({"path": "data/train.jsonl"}, prefix), known_values(entry)
    for key in ("path", "id"):
        if entry.get(key):
            source.values["path"] = str(entry[key])
            draft.carried(f"{prefix}.{key}", "path", source.values["path"])
    if not entry.get("path") and not entry.get("id"):
        draft.missing(f"{prefix}.path", NO_PATH)
    for key in ("name", "config"):
        if entry.get(key) not in (None, "default"):
            source.values["subset"] = str(entry[key])
        draft.carried(f"{prefix}.{key}", "subset", source.values.get("subset", "the only one"))
    if entry.get("split"):
        if refused := carry_split(draft, f"{prefix}.split", source, str(entry["split"])):
            draft.refuse(f"{prefix}.split", refused)
        draft.carried(f"{prefix}.split", "split", source.values.get("split"))
    weight = draft.config.number(f"{prefix}.weight")
    if weight is not None:
        if weight != 1:
            source.values["weight"] = weight
        draft.carried(f"{prefix}.weight", "weight", weight, "a share of the rows" if weight != 1 else "")
    if entry.get("data_files") or entry.get("data_dir"):
        name = "data_files" if entry.get("data_files") else "data_dir"
        files = [str(each) for each in as_list(entry[name])]
        if source.values["path"] in BUILDERS:
            source.values["path"] = files[0]
        draft.carried(f"{prefix}.{name}", "path", source.values["path"])
    draft.no_effect(f"{prefix}.columns", "the columns of the row format are read")
    return source


def _carry_mixture(draft: Draft) -> None:
    draft.no_effect("dataset_mixture.seed", "training.seed sets the order of rows")
    draft.no_effect("dataset_num_proc", "encoded rows are cached")


def _carry_eval(draft: Draft) -> None:
    """Carry the evaluation rows: a share of the training rows, or another split where evaluations are on."""
    config = draft.config
    for key in ("test_split_size", "dataset_mixture.test_split_size"):
        if config.get(key) is not None:
            if "data.eval" in draft.values:
                draft.no_effect(key, "rows of another split are evaluated")
                return
            carry_eval_fraction(draft, key)
            return
    strategy = config.get("eval_strategy", config.get("evaluation_strategy"))
    off = strategy in (None, False, "no")
    split = str(config.get("dataset_test_split") or "test")
    splits = as_list(config.get("splits"))
    name = config.get("dataset_name")
    if "data.eval" in draft.values:
        return
    if off or not isinstance(name, str):
        if off:
            draft.no_effect("dataset_test_split", "eval_strategy is no")
        else:
            draft.refuse("dataset_test_split", "the rows are not named; accepted: no evaluation")
        draft.assume("data.eval", None, "eval_strategy is no" if off else "no rows of another split are named")
        return
    source = Source({"path": name, "split": str(splits[1]) if len(splits) > 1 else split}, "dataset_test_split")
    if subset := config.get("dataset_config"):
        source.values["subset"] = str(subset)
    write_sources(draft, "data.eval", [source])
    draft.carried("dataset_test_split", "data.eval", split)
