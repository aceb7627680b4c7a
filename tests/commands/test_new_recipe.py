"""`lora init --interactive`: scripted answers give a recipe that passes its checks; wrong ones are asked again."""

import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from transformers import PretrainedConfig

from lora_cli import cli
from lora_cli.commands.new_recipe import write_first_recipe
from lora_cli.errors import LoraError
from lora_cli.recipe.load import load_recipe
from lora_cli.setup.first_inputs import FoundModel
from lora_cli.setup.first_recipe import parameters_in_name
from lora_cli.setup.recipe_text import render_recipe
from tests.commands.conftest import Lora

Scripted = Callable[..., dict[str, Any]]


@pytest.fixture
def scripted(workdir: Path) -> Scripted:
    """Return a function that answers the questions, and returns the values of the written recipe."""

    def run(*answers: str) -> dict[str, Any]:
        lines = iter([*answers, ""])
        path = write_first_recipe(read=lambda: f"{line}\n" if (line := next(lines, None)) is not None else "")
        text = path.read_text()
        assert uncommented(text) == []
        value: dict[str, Any] = yaml.safe_load(text)
        return value

    return run


def uncommented(text: str) -> list[str]:
    """The lines of a recipe without a comment on their value, which test_init.py refuses in configs/."""
    return [line for line in text.splitlines() if ":" in line and not line.rstrip().endswith(":") and "# " not in line]


def write_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_chat_model_on_the_cpu(scripted: Scripted, lora: Lora, capfd: pytest.CaptureFixture[str]):
    value = scripted("base", "rows.jsonl", "", "0", "first")
    assert value["model"] == {"path": "base", "dtype": "auto"}
    assert (value["task"], value["data"]["format"]) == ("causal-lm", "messages")
    assert "quantization" not in value
    assert value["data"]["max_length"] == 64, "the longest row has fewer tokens"
    assert value["data"]["overlong"] == "error", "all rows were read"
    assert value["data"]["eval"] == 0.1
    assert value["output"] == "runs/first"
    told = capfd.readouterr()
    assert told.out == "first.yaml\n"
    assert "data.max_length: 64 (tokens; the longest row has" in told.err
    assert lora("check", "first.yaml", "--no-model").code == 0
    checked = lora("check", "first.yaml")
    assert checked.code == 0, checked.err


@pytest.mark.slow
def test_the_plan_decides_on_the_bits(scripted: Scripted, capfd: pytest.CaptureFixture[str]):
    small, large = (
        scripted("base", "rows.jsonl", "", "1", "24GB", "a"),
        scripted("base", "rows.jsonl", "", "2", "80", "b"),
    )
    assert "quantization" not in small
    assert "quantization" not in large
    assert "24.0 GB" in Path("a.yaml").read_text().splitlines()[0]
    assert "2 GPUs with 74.5 GiB (80.0 GB) each" in Path("b.yaml").read_text().splitlines()[0]
    capfd.readouterr()
    scripted("base", "rows.jsonl", "", "1", "0.5371GB", "1", "24GB", "c")
    assert "no form of this run fits" in capfd.readouterr().err


@pytest.mark.slow
def test_four_bits_where_16_do_not_fit(scripted: Scripted, lora: Lora):
    """A wide model of which 16-bit weights take 0.8 GiB, on a GPU with 0.5 GiB after the context of CUDA."""
    config = json.loads(Path("base/config.json").read_text())
    Path("wide").mkdir()
    for file in Path("base").iterdir():
        if file.suffix != ".safetensors":
            (Path("wide") / file.name).write_bytes(file.read_bytes())
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 16, "head_dim": 128}
    Path("wide/config.json").write_text(json.dumps(config))
    value = scripted("wide", "rows.jsonl", "none", "1", "1.1GB", "wide-run")
    assert value["quantization"] == {"bits": 4}
    assert value["data"]["eval"] is None
    assert "which does not fit" in Path("wide-run.yaml").read_text()
    planned = lora("check", "wide-run.yaml", "--gpus", "1", "--budget", "1.1GB")
    assert planned.code == 0, planned.err
    assert "no form fits" not in planned.out


@pytest.mark.slow
def test_wrong_answers_are_asked_again(scripted: Scripted, capfd: pytest.CaptureFixture[str]):
    Path("runs/taken").mkdir(parents=True)
    write_rows("odd.jsonl", [{"x": 1}] * 30)
    value = scripted(
        *("no/such/folder", "base"),
        *("missing.jsonl", "odd.jsonl", "rows.jsonl"),
        *("2", "0%", "5%"),
        *("many", "-1", "1", "much", "100MB", "24GB"),
        *("a/b", "taken", "right"),
    )
    assert value["data"]["eval"] == 0.05
    told = capfd.readouterr().err
    for problem in (
        "model.path: there is no folder no/such/folder",
        "missing.jsonl does not exist",
        "no known format has these columns: x",
        "many is not a number of GPUs",
        "memory much",
        "a GPU needs 512 MiB before any tensor",
        "2 is not a share of the rows",
        "a/b is not a name",
        "runs/taken exists",
    ):
        assert problem in told, problem
    assert "Traceback" not in told


@pytest.mark.slow
def test_each_answer_is_checked_where_it_is_given(
    scripted: Scripted, lora: Lora, workdir: Path, capfd: pytest.CaptureFixture[str]
):
    """None of these would be found before the recipe is written."""
    (workdir / "damaged").mkdir()
    (workdir / "damaged/config.json").write_text("{")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    write_rows("alpaca.jsonl", [{"instruction": f"say {i}", "output": f"{i}"} for i in range(9)])
    long = [{"messages": [*row["messages"][:1], {"role": "assistant", "content": "yes " * 40}]} for row in rows[:3]]
    write_rows("long.jsonl", [{**row, "n": i} for i, row in enumerate(long)])
    write_rows("images.jsonl", [{"messages": [{"role": "narrator", "content": "x"}] * 2}] * 5)
    value = scripted(
        *("a$HOME/base", "damaged", "base"),
        *("$ROWS.jsonl", "images.jsonl", "/", "rows.jsonl"),
        *("rows.jsonl", "./rows.jsonl", "alpaca.jsonl", "long.jsonl"),
        "0",
        *("x" * 200, "x" * 101, "a.jsonl", "right"),
    )
    assert value["data"]["eval"] == "long.jsonl"
    told = capfd.readouterr().err
    for problem in (
        "model.path: variables are not expanded",
        "damaged/config.json",
        "data.train: variables are not expanded",
        "data: the folder /",
        "data.eval: rows.jsonl reads a file of data.train: rows.jsonl",
        "data.eval: ./rows.jsonl reads a file of data.train: rows.jsonl",
        "alpaca.jsonl",
        f"{'x' * 101} is not a name",
        "output: 'runs/a.jsonl' looks like a file",
    ):
        assert problem in told, problem
    checked = lora("check", "right.yaml")
    assert checked.code == 0, "the longest evaluation row fits: " + checked.err


def test_a_home_folder_is_written_out(scripted: Scripted, workdir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(workdir))
    value = scripted("~/base", "~/rows.jsonl", "", "0", "home")
    assert (value["model"]["path"], value["data"]["train"]) == (f"{workdir}/base", f"{workdir}/rows.jsonl")


@pytest.mark.slow
def test_rows_that_fit_several_tasks(scripted: Scripted, lora: Lora):
    write_rows("reviews.jsonl", [{"text": f"the answer {i}", "label": "yes" if i % 2 else "no"} for i in range(60)])
    classifier = scripted("base", "reviews.jsonl", "", "", "0", "classify")
    assert (classifier["task"], classifier["data"]["format"]) == ("seq-cls", "classification")
    assert classifier["training"]["rows_per_step"] == 16
    assert "packing" not in classifier["data"]
    language = scripted("base", "reviews.jsonl", "poetry", "causal-lm", "", "0", "language")
    assert (language["task"], language["data"]["format"]) == ("causal-lm", "text")
    for name in ("classify", "language"):
        assert lora("check", f"{name}.yaml", "--no-model").code == 0
        checked = lora("check", f"{name}.yaml")
        assert checked.code == 0, checked.err


@pytest.mark.slow
def test_a_few_bad_rows_are_skipped_and_many_refused(scripted: Scripted, lora: Lora, capfd: pytest.CaptureFixture[str]):
    good = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    write_rows("few.jsonl", [*good, {"messages": []}])
    value = scripted("base", "few.jsonl", "", "0", "few")
    assert value["data"]["on_bad_row"] == "skip"
    assert "1 cannot be used: " in capfd.readouterr().err
    assert lora("check", "few.yaml", "--no-model").code == 0
    write_rows("many.jsonl", [*good[:5], *[{"messages": []}] * 5])
    scripted("base", "many.jsonl", "rows.jsonl", "", "0", "many")
    assert "many.jsonl: 5 of 10 rows cannot be used as messages" in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_that_is_not_here_is_planned_by_its_name(
    scripted: Scripted, lora: Lora, capfd: pytest.CaptureFixture[str]
):
    value = scripted("org/Big-70B-Instruct", "rows.jsonl", "", "1", "24GB", "big")
    assert value["quantization"] == {"bits": 4}
    assert value["data"]["max_length"] == 1024
    assert "its memory is estimated by the size in its name" in capfd.readouterr().err
    assert lora("check", "big.yaml", "--no-model").code == 0
    assert "quantization" not in scripted("org/Small-135M", "rows.jsonl", "", "1", "24GB", "small")


@pytest.mark.slow
def test_the_end_of_the_input_writes_nothing(scripted: Scripted, workdir: Path):
    before = sorted(workdir.iterdir())

    def ends() -> str:
        return ""

    with pytest.raises(LoraError, match="nothing was written"):
        write_first_recipe(read=ends)
    assert sorted(workdir.iterdir()) == before


def test_without_a_terminal_there_is_one_error(lora: Lora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    result = lora("init", "--interactive")
    assert result.code == 2
    assert result.last_two[0] == "error: --interactive asks questions, and stdin is not a terminal"
    assert (
        lora("init", "quickstart", "--interactive")
        .last_two[0]
        .startswith("error: --interactive writes a recipe of its")
    )


class Terminal:
    """`lora init --interactive` in a terminal of its own, in a fork of this process."""

    def __init__(self) -> None:
        self.pid, self.leader = pty.fork()
        if self.pid == 0:
            _run_in_terminal()
        self.text = ""

    def until(self, expected: str, *, seconds: float = 60) -> None:
        """Read until the text appears after what was read before."""
        deadline, start = time.monotonic() + seconds, len(self.text)
        while expected not in self.text[start:]:
            assert time.monotonic() < deadline, self.text
            try:
                self.text += os.read(self.leader, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(self.text) from None

    def send(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def end(self) -> int:
        """Return the exit code, after the rest of the output."""
        with suppress(OSError):  # the other side is closed
            while part := os.read(self.leader, 4096):
                self.text += part.decode(errors="replace")
        os.close(self.leader)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run_in_terminal() -> NoReturn:
    code: object = 1
    try:
        # The streams of this process are those of pytest.
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.argv = ["lora", "init", "--interactive", "--json", "done.json"]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


@pytest.fixture
def terminal(workdir: Path) -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(opened.pid, signal.SIGKILL)
        os.waitpid(opened.pid, 0)


@pytest.mark.slow
def test_in_a_terminal(terminal: Terminal, workdir: Path):
    terminal.until("base model (hub id, folder or .gguf file) [HuggingFaceTB/SmolLM2-135M-Instruct]: ")
    terminal.send("base\n")
    terminal.until("training rows (file, folder, URL or hub dataset): ")
    terminal.send("rows.jsonl\n")
    terminal.until("evaluation rows (a share of the training rows, a file, or none) [0.1]: ")
    terminal.send("\n")
    terminal.until("GPUs (0: the CPU of this machine) [0]: ")
    terminal.send("\n")
    terminal.until("name of the recipe and its run [base-rows]: ")
    terminal.send("\n")
    assert terminal.end() == 0, terminal.text
    assert "next: lora check base-rows.yaml; lora train base-rows.yaml" in terminal.text
    assert load_recipe(workdir / "base-rows.yaml").output == "runs/base-rows"
    assert json.loads((workdir / "done.json").read_text()) == {"written": "base-rows.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize(("key", "code"), [("\x03", 130), ("\x04", 1)], ids=["Ctrl-C", "Ctrl-D"])
def test_a_key_that_ends_it_leaves_nothing(key: str, code: int, terminal: Terminal, workdir: Path):
    before = sorted(workdir.iterdir())
    terminal.until("base model (hub id, folder or .gguf file)")
    terminal.send("base\n")
    terminal.until("training rows")
    terminal.send(key)
    assert terminal.end() == code, terminal.text
    assert "Traceback" not in terminal.text
    assert sorted(workdir.iterdir()) == before


def test_the_size_in_a_name():
    sizes: dict[str, float | None] = {
        "meta-llama/Llama-3.1-8B-Instruct": 8e9,
        "SmolLM2-135M": 135e6,
        "Qwen3-0.6B": 0.6e9,
        "gpt2": None,
    }
    assert {name: parameters_in_name(name) for name in sizes} == sizes
    assert parameters_in_name("Qwen3-30B-A3B") == 30e9


def test_values_are_written_as_yaml_reads_them():
    values: dict[str, tuple[Any, str]] = {
        "model.path": ("a: b #c", "x"),
        "training.learning_rate": (2e-4, "x"),
        "data.columns": ({"prompt": "question"}, "x"),
        "data.eval": (None, "x"),
        "output": ("runs/true", "x"),
    }
    assert yaml.safe_load(render_recipe("title", values)) == {
        "model": {"path": "a: b #c"},
        "training": {"learning_rate": 2e-4},
        "data": {"columns": {"prompt": "question"}, "eval": None},
        "output": "runs/true",
    }


def test_a_model_without_config_has_every_task():
    assert FoundModel("org/x", None).tasks[0] == "causal-lm"
    assert FoundModel("org/x", PretrainedConfig()).tasks == []
