"""Mistakes with paths: a file for a folder, a folder for a file, the wrong kind of file, arguments in the wrong order.

For tests/commands/test_mistakes.py.
"""

from pathlib import Path

from tests.inputs.mistakes import Mistake, folder_writer

RUN_OR_ADAPTER = "give a run of lora train, or an adapter folder"
PASS_A_RECIPE = "pass a recipe (a .yaml file)"
RUNS = "name the folder of your runs: lora runs FOLDER"


def _mistake(command: str, error: str, hint: str) -> Mistake:
    return Mistake({}, [f"error: {error}", f"hint: {hint}"], command=command)


PATH_MISTAKES = {
    "a run for its recipe": Mistake(
        {},
        ["error: run is a folder, not a file", "hint: pass the recipe of this run: run/recipe.yaml"],
        command="train run",
        setup=folder_writer("run", "recipe.yaml"),
    ),
    "a link to nothing for a recipe": Mistake(
        {},
        ["error: link.yaml is a link to nothing", f"hint: {PASS_A_RECIPE}"],
        command="check link.yaml",
        setup=lambda: Path("link.yaml").symlink_to("nothing"),
    ),
    "a recipe for an adapter": _mistake(
        "merge recipe.yaml --out m", "recipe.yaml is a file, not an adapter", RUN_OR_ADAPTER
    ),
    "a recipe for a model": _mistake(
        "export recipe.yaml --to gguf --out x.gguf",
        "MODEL: recipe.yaml is a file, not a folder",
        ". contains base, recipe.yaml, rows.jsonl; MODEL accepts a .gguf file, a folder or a hub id",
    ),
    "a folder for a model": Mistake(
        {},
        [
            "error: MODEL: empty has no config.json",
            "hint: MODEL accepts a folder that save_pretrained wrote, a .gguf file or a hub id",
        ],
        command="export empty --to gguf --out x.gguf",
        setup=folder_writer("empty"),
    ),
    "rows for model.path": Mistake(
        {"model.path": "rows.jsonl"},
        [
            "error: model.path: rows.jsonl is a file, not a folder",
            "hint: . contains base, recipe.yaml, rows.jsonl; model.path accepts a .gguf file, a folder or a hub id",
        ],
    ),
    "a slash behind a folder that is not there": Mistake(
        {"model.path": "bse/"},
        [
            "error: model.path: there is no folder bse/",
            "hint: . contains base, recipe.yaml, rows.jsonl; model.path accepts a .gguf file, a folder or a hub id",
        ],
    ),
    "a file for the folder of runs": _mistake("runs recipe.yaml", "recipe.yaml is a file, not a folder", RUNS),
    "the repository before the result": _mistake(
        "push me/adapter base",
        "me/adapter does not exist: the repository comes behind the result",
        "write lora push base me/adapter",
    ),
    "a file for a foreign adapter": _mistake(
        "adapter convert rows.jsonl --out c",
        "rows.jsonl does not have the name of a file of a known tool",
        "name the tool with --from: mlx, litgpt, torchtune, bin",
    ),
    "a file for the run folder": Mistake(
        {},
        [
            "--output a.gguf: output: 'a.gguf' looks like a file — write a folder",
            "error: 1 problem in recipe.yaml",
        ],
        command="train recipe.yaml --output a.gguf",
    ),
    "a suffix in capitals": _mistake(
        "export base --to gguf --out a.GGUF",
        "--out a.GGUF: gguf is one file, whose name ends in .gguf",
        "write --out a.gguf",
    ),
    "an unknown metric": _mistake(
        "eval recipe.yaml --answers 2 --metric accuracy",
        "--metric accuracy is not known",
        "use one of exact_match, f1, rouge, bleu, chrf, json_valid, numeric_match",
    ),
    "rows for the file of --json": _mistake(
        "eval recipe.yaml --json rows.jsonl",
        "--json rows.jsonl exists, and is no document of lora",
        "name another file",
    ),
    "rows for the file of --predictions": _mistake(
        "eval recipe.yaml --answers 2 --predictions rows.jsonl",
        "--predictions rows.jsonl exists, and has no predictions of lora",
        "name another file",
    ),
    "rows for the file of --plot": _mistake(
        "adapter inspect base --plot rows.jsonl",
        "--plot rows.jsonl: the name of a plot ends in .png or .svg or .pdf",
        "write --plot FILE.png",
    ),
    "a metric without answers": _mistake(
        "eval recipe.yaml --metric f1", "--metric and --predictions need answers", "set their number: --answers 100"
    ),
    "a folder of tasks that is not there": _mistake(
        "eval recipe.yaml --tasks x --tasks-dir nowhere",
        "--tasks-dir nowhere: folder not found",
        "name a folder with YAML files of tasks",
    ),
}
