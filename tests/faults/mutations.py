"""Campaigns of seeded mutations: adapters, bases, files of rows, chat templates and recipes, each opened by the tool.

A file that is valid and has other values than before (a flipped weight, another learning rate) is another input, which
only checksums can tell from the one that was written. It counts as silent where the folder has them.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import mutate_adapter, mutate_model, outcome, recipes, row_files, templates
from tests.faults.campaign import Campaign, Outcome, Verdict

OF_ADAPTER: dict[str, Verdict] = {"leftovers": "lost", "traceback": "traceback", "hang": "hang"}
OF_MODEL: dict[str, Verdict] = {"traceback": "traceback", "hang": "hang"}
OF_INPUT: dict[str, Verdict] = {
    "done": "survived", "refused": "survived", "traceback": "traceback", "message": "traceback", "signal": "lost",
    "hang": "hang", "silent": "silent",
}  # fmt: skip


def _adapter_cases(seed: int, _: Path) -> Iterator[mutate_adapter.Case]:
    return mutate_adapter.cases(seed)


def _try_adapter(case: mutate_adapter.Case, folder: Path) -> Outcome:
    found = mutate_adapter.try_case(case, folder)
    verdict = OF_ADAPTER.get(found.verdict, "survived")
    if found.verdict == "silent" and case.with_checksums:
        verdict = "silent"
    return Outcome(verdict, f"{case.command}, {case.kind}: {found.damage}", found.detail[-300:])


class _Models(NamedTuple):
    """What the cases of bases share."""

    rows: Path
    expected: dict[str, mutate_model.Results]


def _prepare_models(folder: Path) -> None:
    from tests.commands.conftest import rows as conversations
    from tests.inputs.tiny_tokenizers import CHATML, build
    from tests.model import zoo
    from tests.model.test_gguf_base import write_gguf

    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    for name, size in (("single", "5GB"), ("sharded", "150KB")):
        zoo.make("llama", vocab_size=len(tokenizer)).save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf", "Q8_0")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations(4)))
    os.environ["LORA_CACHE"] = str(folder / "cache")
    paths = {name: folder / name / ("model.gguf" if name == "gguf" else "") for name in ("single", "sharded", "gguf")}
    results = {name: mutate_model.run_model(str(path), rows) for name, path in paths.items()}
    (folder / "expected").write_bytes(pickle.dumps(results))


def _model_cases(seed: int, _: Path) -> Iterator[tuple[str, int]]:
    return ((case.kind, case.seed) for case in mutate_model.cases(seed))


def _try_model(case: tuple[str, int], folder: Path) -> Outcome:
    os.environ["LORA_CACHE"] = str(folder / "cache")
    found = mutate_model.try_case(
        mutate_model.case(*case),
        folder / "mutated",
        models={name: folder / name for name in ("single", "sharded", "gguf")},
        rows=folder / "rows.jsonl",
        expected=pickle.loads((folder / "expected").read_bytes()),
    )
    return Outcome(OF_MODEL.get(found.kind, "survived"), f"a base, {case[0]} {case[1]}", found.detail[-300:])


def _of_input(found: outcome.Outcome, name: str) -> Outcome:
    return Outcome(OF_INPUT[found.kind], name, found.detail)


def _try_rows(case: row_files.RowFile, folder: Path) -> Outcome:
    return _of_input(row_files.try_row_file(case, folder), f"rows: {case.seed}")


def _try_template(case: templates.TemplateCase, folder: Path) -> Outcome:
    try:
        return _of_input(templates.try_template(case, folder), f"template: {case.name}")
    finally:
        for cache in folder.glob("cache-*"):
            shutil.rmtree(cache)


def _try_recipe(case: recipes.RecipeCase, folder: Path) -> Outcome:
    return _of_input(recipes.try_recipe(case, folder), f"recipe: {case.name}")


def _nothing(_: Path) -> None:
    """These cases write their own files."""


def _without_folder(cases: Any) -> Any:
    return lambda seed, _: cases(seed)


MUTATIONS = {
    "adapters": Campaign(
        "mutated adapters", "adapters", mutate_adapter.prepare, _adapter_cases, _try_adapter, 3000, 2,
    ),
    "bases": Campaign("mutated bases", "bases", _prepare_models, _model_cases, _try_model, 3000, 2),
    "rows": Campaign(
        "mutated files of rows", "rows", _nothing, _without_folder(row_files.row_file_cases), _try_rows, 1500,
    ),
    "templates": Campaign(
        "hostile chat templates", "templates", _nothing, _without_folder(templates.template_cases), _try_template, 300,
    ),
    "recipes": Campaign(
        "mutated recipes", "recipes", _nothing, _without_folder(recipes.recipe_cases), _try_recipe, 3000,
    ),
}  # fmt: skip
