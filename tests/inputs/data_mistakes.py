"""Mistakes in the data, labels, output and command line, with the exact lines of each error."""

from tests.inputs.mistakes import (
    Mistake,
    file_writer,
    folder_writer,
    write_encoder_and_classes,
    write_model_without_template,
)

CLASSES = {"model.path": "bert", "task": "seq-cls", "data.train": "classes.jsonl"}

DATA_MISTAKES = {
    "rows without a name": Mistake(
        {"data.train": ""},
        [
            "recipe.yaml:9: data.train: an empty string — write a value, or remove the key",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "a name that is no file and no hub id": Mistake(
        {"data.train": "our rows"},
        [
            "error: data: our rows is not a file or folder, and cannot be a hub id",
            "hint: correct the path; a hub id is NAME or ORG/NAME, of at most 96 letters, digits and single - . _",
        ],
    ),
    "a label that is not in data.labels": Mistake(
        {**CLASSES, "data.labels": ["yes", "no"]},
        [
            "error: classes.jsonl:3: label maybe: not one of the model's 2 labels",
            "hint: these are yes, no: fix the row, or add the label to data.labels",
        ],
        setup=write_encoder_and_classes,
    ),
    "max_length above the encoder's positions": Mistake(
        {**CLASSES, "data.max_length": 4096},
        ["error: data.max_length: 4,096 tokens, but the model has positions for 2,048", "hint: at most 2048"],
        setup=write_encoder_and_classes,
    ),
    "virtual tokens beyond the encoder's positions": Mistake(
        {**CLASSES, "data.max_length": 2048, "adapter": {"method": "prompt", "virtual_tokens": 4}},
        [
            "error: data.max_length: 2,048 tokens and 4 virtual tokens, but the model has positions for 2,048",
            "hint: at most 2044",
        ],
        setup=write_encoder_and_classes,
    ),
    "labels listed for regression values": Mistake(
        {**CLASSES, "data.labels": ["no", "yes"]},
        [
            "error: data.labels: 2 labels are listed, but the rows have regression values such as 1.0",
            "hint: write labels as names or integers, several labels of a row as a list; or data: {labels: regression}",
        ],
        setup=lambda: (
            write_encoder_and_classes(),
            file_writer("classes.jsonl", "".join(f'{{"text": "fox {i}", "label": 1.0}}\n' for i in range(9)))(),
        ),
    ),
    "several labels as zeros and ones": Mistake(
        CLASSES,
        [
            "error: classes.jsonl: 9 of 9 rows are bad",
            "hint: fix them, or set data.on_bad_row: skip to drop and count them",
        ],
        setup=lambda: (
            write_encoder_and_classes(),
            file_writer("classes.jsonl", '{"text": "the fox", "label": [0, 1, 0]}\n' * 9)(),
        ),
    ),
    "a regression value that is not a number": Mistake(
        {**CLASSES, "data.labels": "regression"},
        [
            "error: classes.jsonl: 9 of 9 rows are bad",
            "hint: fix them, or set data.on_bad_row: skip to drop and count them",
        ],
        setup=lambda: (
            write_encoder_and_classes(),
            file_writer("classes.jsonl", '{"text": "the fox", "label": "nan"}\n' * 9)(),
        ),
    ),
    "no data file": Mistake(
        {"data.train": "row.jsonl"},
        ["error: data: row.jsonl does not exist", "hint: did you mean rows.jsonl?"],
    ),
    "an empty data file": Mistake(
        {},
        ["error: rows.jsonl: contains no rows", "hint: leave the file out, or add rows"],
        setup=file_writer("rows.jsonl", ""),
    ),
    "rows of another format": Mistake(
        {"data.format": "alpaca"},
        [
            "error: rows.jsonl: 24 of 24 rows are bad",
            "hint: the rows look like messages: set format: auto",
        ],
    ),
    "a folder without rows": Mistake(
        {"data.train": "empty"},
        [
            "error: data: the folder empty contains no data files",
            "hint: supported file types: .jsonl .json .csv .tsv .parquet .txt; text files also .gz .bz2 .xz .zst .zip",
        ],
        setup=folder_writer("empty"),
    ),
    "conversations for a model without chat template": Mistake(
        {"model.path": "plain"},
        [
            "error: data: the rows are conversations, but the tokenizer has no chat template",
            "hint: set data.chat_template: a named template (chatml, alpaca, ...), a path, or inline Jinja",
        ],
        setup=write_model_without_template,
    ),
    "max_length above the model's positions": Mistake(
        {"data.max_length": 4096},
        ["error: data.max_length: 4,096 tokens, but the model has positions for 2,048", "hint: at most 2048"],
    ),
    "rows longer than max_length": Mistake(
        {"data.max_length": 16},
        [
            "error: rows.jsonl: 24 of 24 rows are longer than data.max_length (16 tokens)",
            "hint: raise data.max_length, or set data.overlong to drop or truncate",
        ],
    ),
    "output inside a file": Mistake(
        {"output": "rows.jsonl/run"},
        ["error: rows.jsonl/run is a file, or inside a file", "hint: set output to a folder"],
    ),
    "output in a folder of other files": Mistake(
        {"output": "mine"},
        ["error: mine contains files but no run: thesis.tex", "hint: set output to a new or empty folder"],
        setup=folder_writer("mine", "thesis.tex"),
    ),
    "resume without a run": Mistake(
        {},
        [
            "error: runs/a contains no run to resume",
            "hint: start it without --resume; to resume a run that was moved, give the recipe.yaml in its folder",
        ],
        command="train recipe.yaml --resume",
    ),
    "resume and fresh": Mistake(
        {},
        ["error: --resume and --fresh are both set", "hint: keep one"],
        command="train recipe.yaml --resume --fresh",
    ),
    "epochs and max_steps": Mistake(
        {"training.epochs": 1},
        [
            "recipe.yaml:13: training.max_steps: epochs and max_steps are both set — keep one",
            "error: 1 problem in recipe.yaml",
        ],
    ),
    "no recipe": Mistake(
        {},
        ["error: recpe.yaml does not exist", "hint: did you mean recipe.yaml?"],
        command="train recpe.yaml",
    ),
    "the data file as recipe": Mistake(
        {},
        [
            "error: rows.jsonl is a file of rows, not a recipe",
            "hint: pass a recipe (a .yaml file) that names it in data.train",
        ],
        command="train rows.jsonl",
    ),
    "the model as recipe": Mistake(
        {},
        ["error: base is a folder, not a file", "hint: pass a recipe (a .yaml file)"],
        command="train base",
    ),
    "a --set of an unknown key": Mistake(
        {},
        ["--set lr=1: lr: unknown key — use training.learning_rate", "error: 1 problem in recipe.yaml"],
        command="train recipe.yaml --set lr=1",
    ),
    "a --set without a value": Mistake(
        {},
        [
            "--set training.seed: missing `=` — write it like training.learning_rate=1e-4",
            "error: 1 problem in recipe.yaml",
        ],
        command="train recipe.yaml --set training.seed",
    ),
    "eval on rows that are all dropped": Mistake(
        {"data.on_bad_row": "skip", "data.max_loss": 1.0},
        [
            "error: other.jsonl: no rows are left",
            "hint: check data.on_bad_row, data.overlong and the weights",
        ],
        command="eval recipe.yaml --data other.jsonl",
        setup=file_writer("other.jsonl", "nope\n"),
    ),
    "eval of a base model": Mistake(
        {},
        ["error: base is not a recipe, run or adapter folder", "hint: give a YAML file, or a folder of lora train"],
        command="eval base",
    ),
}
