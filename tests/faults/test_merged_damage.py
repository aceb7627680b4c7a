"""A merged model that was damaged after it was written is refused by every command that reads it."""

import shutil
from pathlib import Path

import pytest

from tests.commands.conftest import Lora, write_recipe
from tests.faults.damage import damages

pytestmark = pytest.mark.slow
KINDS = ("flip-bit", "zero-block", "remove", "empty")
COMMANDS = (
    ["chat", "merged", "--max-new-tokens", "2"],
    ["export", "merged", "--to", "gguf", "--out", "out.gguf", "--verify", "file"],
    ["eval", "runs/a", "--adapter", "merged=merged"],
    ["train", "next.yaml"],
)


def test_every_damage_of_a_file_that_decides_something_is_refused(trained_run: Path, lora: Lora):
    assert lora("merge", "runs/a", "--out", "merged").code == 0
    write_recipe(Path("next.yaml"), {"model.path": "merged", "output": "runs/next"})
    intact = Path("merged").rename("intact")
    tried = 0
    for damage in damages(intact, seed=3, kinds=KINDS):
        if "README.md" in damage.name or "checksums.json" in damage.name:
            continue
        shutil.copytree(intact, "merged")
        damage.apply(Path("merged"))
        result = lora(*COMMANDS[tried % len(COMMANDS)])
        assert result.code == 2, (damage.name, result.err)
        assert "is not the model that was verified" in result.last_two[0] or "merged" in result.last_two[0], damage.name
        assert result.last_two[1].startswith("hint: "), damage.name
        shutil.rmtree("merged")
        tried += 1
    assert tried > 16


def test_a_check_reads_no_weights_of_a_merged_model(trained_run: Path, lora: Lora):
    assert lora("merge", "runs/a", "--out", "merged").code == 0
    write_recipe(Path("next.yaml"), {"model.path": "merged", "output": "runs/next"})
    file = Path("merged/generation_config.json")
    file.write_bytes(file.read_bytes() + b" ")
    result = lora("check", "next.yaml")
    assert result.code == 2
    assert result.last_two == [
        f"error: model.path: merged is not the model that was verified: generation_config.json has "
        f"{file.stat().st_size:,} bytes, not {file.stat().st_size - 1:,}",
        "hint: write it again, or restore it; if you changed it yourself, remove merged/checksums.json",
    ]
    Path("merged/checksums.json").unlink()
    assert lora("check", "next.yaml").code == 0
