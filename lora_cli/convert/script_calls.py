"""What a TRL or unsloth script does with its rows and calls, in lines of the report. No torch."""

from lora_cli.convert.draft import Draft
from lora_cli.convert.python_script import STANDARDIZE

SCRIPT_KEYS = (
    "trainer dataset dataset.map dataset.filter dataset.select dataset.shuffle dataset.train_test_split "
    "dataset.rename_column dataset.rename_columns dataset.remove_columns dataset.take dataset.skip dataset.sort "
    "dataset.shard instruction_part response_part eval_dataset args model tokenizer train_dataset peft_config "
    "data_collator quantization_config " + " ".join(f"dataset.{name}" for name in STANDARDIZE)
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
    for key in config.values:
        if ", line " in key:
            draft.refuse(key, "the script does this twice, and a recipe is one run; accepted: the first")
    _carry_map(draft)
    for name in STANDARDIZE:
        draft.same(f"dataset.{name}", "names of keys and roles are read as they are")
    draft.no_effect("dataset.shuffle", "training.seed sets the order of rows")
    draft.same("dataset.remove_columns", "the columns of the row format are read")
    rows = config.get("dataset.select")
    if isinstance(rows, int):
        draft.carried("dataset.select", "max_rows", rows)
    for name in ("filter", "select", "take", "skip", "shard", "rename_column", "rename_columns", "train_test_split"):
        draft.refuse(f"dataset.{name}", f"changes the rows in code: write them to a file; {ROWS_AS_STORED}")
    draft.no_effect("dataset.sort", "training.seed sets the order of rows")
    draft.refuse("eval_dataset", "its rows are chosen in code: write data.eval; accepted: no evaluation")


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
