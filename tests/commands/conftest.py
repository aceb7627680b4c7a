"""A folder as a user has it before the first run: rows, a recipe and a tiny model; and `lora` to type in it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lora_cli import cli
from lora_cli.training import cpu


class Done(NamedTuple):
    """What a command left in the terminal."""

    code: int
    out: str
    err: str

    @property
    def last_two(self) -> list[str]:
        """The `error:` and the `hint:` line of a refusal."""
        return self.err.splitlines()[-2:]


Lora = Callable[..., Done]
WriteRecipe = Callable[..., Path]

# The command in a process of its own. With as many threads as the tests have, sums are rounded alike.
LORA_ON_ONE_CORE = [
    sys.executable,
    "-c",
    "import os; os.sched_getaffinity = lambda _: {0}; from lora_cli.cli import main; main()",
]

QUESTIONS = ["What is the capital of France?", "How are you?", "What is the answer?", "line one", "Who jumps?"]
ANSWERS = ["Paris is the capital.", "I am fine.", "The answer is forty two.", "line two", "The quick brown fox."]


def rows(count: int = 24) -> list[dict[str, Any]]:
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


def furnish(folder: Path, tiny_folder: Path) -> None:
    """Put rows.jsonl and the model `base` into `folder`."""
    (folder / "base").symlink_to(tiny_folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))


def write_recipe(path: Path, changes: dict[str, Any] | None = None) -> None:
    """The tiny recipe with dotted keys changed: `{"training.seed": 1}`."""
    tree = tiny_recipe()
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


@pytest.fixture
def place(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, furnished; all such share one cache, as each encodes the same few rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE", str(tiny_folder.parent / "cache"))
    # A tiny model on many threads does little but wait for them.
    monkeypatch.setattr(cpu, "available_cores", lambda: 1)
    furnish(tmp_path, tiny_folder)
    return tmp_path


@pytest.fixture
def recipe(place: Path) -> WriteRecipe:
    """Writes recipe.yaml into the working folder: `recipe({"training.seed": 1})`."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        write_recipe(Path("recipe.yaml"), changes)
        return Path("recipe.yaml")

    return write


@pytest.fixture
def lora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lora:
    """Types a command, `lora("train", "recipe.yaml")`: in this process, through `main`, as the console script does."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, words)])
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        assert isinstance(code, int)
        return Done(code, *capfd.readouterr())

    return run


class Finished(NamedTuple):
    """A run that `lora train recipe.yaml` made in a process of its own."""

    folder: Path
    done: Done


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Finished:
    """One complete run for all tests that only look at it."""
    here = tmp_path_factory.mktemp("finished")
    furnish(here, tiny_folder)
    write_recipe(here / "recipe.yaml")
    run = subprocess.run(
        [*LORA_ON_ONE_CORE, "train", "recipe.yaml"],
        cwd=here,
        env={**os.environ, "LORA_CACHE": str(tiny_folder.parent / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return Finished(here / "runs" / "a", Done(run.returncode, run.stdout, run.stderr))


@pytest.fixture
def trained(finished: Finished, recipe: WriteRecipe) -> Path:
    """A copy of the finished run at runs/a, beside its recipe.yaml, to go on with."""
    recipe()
    shutil.copytree(finished.folder, "runs/a")
    return Path("runs/a")
