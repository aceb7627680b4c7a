"""The workspace in which the commands of a page run: a finished run of the quickstart, with a tiny model."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.commands.train import train
from lora_cli.recipe.load import load_recipe
from lora_cli.training import cpu
from tests.docs.tiny_quickstart import write_large_model, write_workspace


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, demo_gguf: Path) -> Path:
    """A folder with configs/, data/quickstart.jsonl, a tiny model of the demo model's name, and runs/quickstart."""
    folder = tmp_path_factory.mktemp("docs") / "quickstart"
    folder.mkdir()
    write_workspace(folder, demo_gguf)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_CACHE", str(folder.parent / "cache"))
        patch.setattr(cpu, "available_cores", lambda: 1)
        assert train(load_recipe(Path("configs/quickstart.yaml")), resume=False, fresh=False, arguments=[]) == 0
    write_large_model(folder / "models" / "Llama-3.1-70B", tokenizer=folder / "runs" / "quickstart" / "adapter")
    return folder


@pytest.fixture
def workspace(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Return a function that makes a copy of the finished workspace, and makes it the working folder."""

    def copy() -> Path:
        folder = tmp_path / "workspace"
        shutil.copytree(quickstart, folder, copy_function=_link_model)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("LORA_CACHE", str(quickstart.parent / "cache"))
        monkeypatch.setattr(cpu, "available_cores", lambda: 1)
        return folder

    return copy


def _link_model(source: str, target: str) -> None:
    """Copy a file; the model, which no command changes, as a link: its unpacked form is in the cache."""
    if source.endswith(".gguf"):
        os.symlink(source, target)
    else:
        shutil.copy2(source, target)
