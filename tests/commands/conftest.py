"""Fixtures of the command tests: a working folder with rows, a recipe and a tiny model; `lora` runs a command in it."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from huggingface_hub import constants

from lora_cli import cli
from lora_cli.commands.train import train
from lora_cli.recipe.load import load_recipe
from lora_cli.run import hub as hub_state
from lora_cli.training import cpu
from tests.support.stub_hub import StubHub, stub_hub


class CommandResult(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str  # stdout
    err: str  # stderr

    @property
    def last_two(self) -> list[str]:
        """The last two lines of stderr: `error:` and `hint:` if the command failed."""
        return self.err.splitlines()[-2:]


Lora = Callable[..., CommandResult]
WriteRecipe = Callable[..., Path]

# The command in a separate process. It uses one thread, like the tests, so that sums are rounded in the same way.
LORA_ON_ONE_CORE = [
    sys.executable,
    "-c",
    "import os; os.sched_getaffinity = lambda _: {0}; from lora_cli.__main__ import main; main()",
]

QUESTIONS = ["What is the capital of France?", "How are you?", "What is the answer?", "line one", "Who jumps?"]
ANSWERS = ["Paris is the capital.", "I am fine.", "The answer is forty two.", "line two", "The quick brown fox."]


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Return conversations of one question and one answer, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{QUESTIONS[i % 5]} ({i})"},
                {"role": "assistant", "content": f"{ANSWERS[(i * 3) % 5]} {i}"},
            ]
        }
        for i in range(count)
    ]


def tiny_recipe() -> dict[str, Any]:
    return {
        "model": {"path": "base", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": "rows.jsonl", "eval": 0.2, "max_length": 128},
        "training": {"max_steps": 4, "eval_every": 2, "save_every": 2, "learning_rate": 1e-2},
        "output": "runs/a",
    }


def write_inputs(folder: Path, tiny_folder: Path) -> None:
    """Write rows.jsonl and a link to the tiny model, `base`, into `folder`."""
    (folder / "base").symlink_to(tiny_folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))


def write_recipe(path: Path, changes: dict[str, Any] | None = None) -> None:
    """Write the tiny recipe with changed values by dotted keys: `{"training.seed": 1}`."""
    tree = tiny_recipe()
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture
def workdir(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with inputs. All tests share one cache of encoded rows, because their rows are the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE", str(tiny_folder.parent / "cache"))
    # A tiny model is slower with many threads.
    monkeypatch.setattr(cpu, "available_cores", lambda: 1)
    write_inputs(tmp_path, tiny_folder)
    return tmp_path


@pytest.fixture
def recipe(workdir: Path) -> WriteRecipe:
    """Return a function that writes recipe.yaml into the working folder: `recipe({"training.seed": 1})`."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        write_recipe(Path("recipe.yaml"), changes)
        return Path("recipe.yaml")

    return write


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lora:
    """Return a function that runs a command in this process, as the console script does: `lora("train", "a.yaml")`."""

    def run(*arguments: object) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as exit_request:
            code = exit_request.code or 0
        assert isinstance(code, int)
        return CommandResult(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of one complete run of `lora train recipe.yaml`, shared by all tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder, tiny_folder)
    write_recipe(folder / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_CACHE", str(tiny_folder.parent / "cache"))
        patch.setattr(cpu, "available_cores", lambda: 1)
        assert train(load_recipe(Path("recipe.yaml")), resume=False, fresh=False, arguments=[]) == 0
    return folder / "runs" / "a"


@pytest.fixture
def trained_run(finished_run: Path, recipe: WriteRecipe) -> Path:
    """A copy of the finished run at runs/a, with its recipe.yaml in the working folder, which tests may change."""
    recipe()
    shutil.copytree(finished_run, "runs/a")
    return Path("runs/a")


def remove_checksums(adapter: Path) -> Path:
    """Remove the checksums of an adapter, so that a command accepts changes of its other files; return its folder."""
    (adapter / "checksums.json").unlink()
    return adapter


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """The hub that the client of this process talks to, by LFS over HTTP, with a token that may write."""
    with stub_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_state, "_answers", {})
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield served
