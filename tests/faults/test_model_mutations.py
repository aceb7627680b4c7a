"""Seeded mutations of every file of a base: each is refused in one line, or opened and run; nothing else happens."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands.conftest import rows as conversations
from tests.faults import mutate_model
from tests.faults.mutate_model import Results, case, run_model, try_case
from tests.model import zoo
from tests.model.test_gguf_base import write_gguf

PER_TEST = 14  # mutations: 308 in all; scripts that run thousands use other seeds


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """The tiny model as one file, as shards, and as a GGUF file."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("single", "sharded", "gguf")}
    for name in ("single", "sharded"):
        shutil.copytree(tiny_folder, folders[name])
    (folders["sharded"] / "model.safetensors").unlink()
    zoo.make("llama", vocab_size=397).save_pretrained(folders["sharded"], max_shard_size="150KB")
    folders["gguf"].mkdir()
    write_gguf(folders["gguf"] / "model.gguf", "Q8_0")
    return folders


class Campaign(NamedTuple):
    """What each mutation needs."""

    models: dict[str, Path]
    rows: Path
    expected: dict[str, Results]


@pytest.fixture(scope="module")
def campaign(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """The unchanged models and what they give; encoded rows are cached in a folder of this module."""
    folder = tmp_path_factory.mktemp("rows")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversations(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_CACHE", str(folder))
        results = {
            name: run_model(str(path / "model.gguf" if name == "gguf" else path), rows) for name, path in models.items()
        }
        yield Campaign(models, rows, results)


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("kind", mutate_model.WEIGHTS)
def test_a_mutated_base_is_refused_in_one_line_or_runs(campaign: Campaign, tmp_path: Path, kind: str, part: int):
    for seed in range(part * PER_TEST, (part + 1) * PER_TEST):
        outcome = try_case(case(kind, seed), tmp_path / "model", **campaign._asdict())
        assert outcome.kind in ("refused", "same", "different"), (kind, seed, outcome)
        if outcome.kind == "refused":
            assert outcome.detail.isprintable(), (kind, seed, outcome)
            assert "None" not in outcome.detail[-4:], (kind, seed, outcome)  # there is a hint
