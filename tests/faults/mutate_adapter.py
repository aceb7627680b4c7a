"""Seeded damages of an adapter folder, each tried with one command in this process: for tests and for scripts/faults.

prepare(folder)                 trains two tiny adapters in `folder`, and records the result of every command
for case in cases(seed):        an endless series
    try_case(case, folder)      damages a copy, runs the command, and judges what it did
"""

import io
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli import cli
from lora_cli.run.checksums import CHECKSUMS_FILE, write_checksums
from tests.faults.damage_adapter import DAMAGES

LIMIT_S = 120  # of one command; a longer one hangs
Command = Callable[[Path], tuple[list[str], Path | None]]  # from the run's folder to arguments and their result


class Case(NamedTuple):
    """One damage and the command that meets it."""

    seed: int
    number: int
    kind: str  # of DAMAGES
    command: str  # of COMMANDS
    source: str  # of SOURCES: the adapter that is damaged
    with_checksums: bool  # whether the folder has checksums.json, as those that lora writes


class Outcome(NamedTuple):
    """What the command did."""

    verdict: str  # refused, told, unchanged, silent, traceback, leftovers or hang
    damage: str  # what was damaged
    detail: str  # last lines of stderr, or the traceback


class Result(NamedTuple):
    """The end of one command."""

    code: int | None  # None: an exception passed
    err: str
    digest: str  # of its result


def _combine(run: Path) -> tuple[list[str], Path]:
    return ["adapter", "combine", f"0.5*{run}", "runs/other", "--out", "out"], Path("out/adapter_model.safetensors")


def _export(to: str, file: str) -> Command:
    return lambda run: (["export", str(run), "--to", to, "--out", file.partition("/")[0]], Path(file))


COMMANDS: dict[str, Command] = {
    "merge": lambda run: (["merge", str(run), "--out", "out"], Path("out/model.safetensors")),
    "export peft": _export("peft", "out/adapter_model.safetensors"),
    "export vllm": _export("vllm", "out/adapter_model.safetensors"),
    "export gguf-adapter": _export("gguf-adapter", "out.gguf"),
    "chat": lambda run: (["chat", str(run), "--max-new-tokens", "4"], None),
    "eval": lambda run: (["eval", str(run), "--json", "out.json"], Path("out.json")),
    "inspect": lambda run: (["adapter", "inspect", str(run), "--json", "out.json"], Path("out.json")),
    "resize": lambda run: (
        ["adapter", "resize", str(run), "--rank", "2", "--out", "out"],
        Path("out/adapter_model.safetensors"),
    ),
    "combine": _combine,
    "train from": lambda run: (
        ["train", "continue.yaml", "--set", f"adapter.from={run}", "--set", "output=out"],
        Path("out/adapter/adapter_model.safetensors"),
    ),
}
# The commands that a classifier's adapter has, and a language model's.
SOURCES = {"lm": [*COMMANDS], "cls": ["merge", "export peft", "eval", "inspect", "resize"]}
RARE = {"train from": 0.2, "eval": 0.5}  # commands that take seconds are drawn less often


def prepare(folder: Path) -> None:
    """Write a base, rows and finished runs into `folder`, and the undamaged result of each command (results.json)."""
    from tests.commands.conftest import write_inputs, write_recipe
    from tests.inputs.tiny_tokenizers import CHATML, build
    from tests.model import zoo

    base = folder / "tiny-llama"
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    zoo.make("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    with _inside(folder):
        write_inputs(folder, base)
        recipes: dict[str, dict[str, Any]] = {
            "lm": {},
            "other": {"training.seed": 1},
            "cls": {"task": "seq-cls", "data.train": "classes.jsonl"},
            "continue": {"training.max_steps": 1, "adapter": {}},
        }
        lines = ({"text": f"{word} {n}", "label": word} for n in range(8) for word in ("good", "bad", "odd"))
        Path("classes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name, changes in recipes.items():
            write_recipe(Path(f"{name}.yaml"), {"output": f"runs/{name}", **changes})
            if name != "continue":
                result = _run(["train", f"{name}.yaml"], None)
                assert result.code == 0, result.err
                write_checksums(Path(f"runs/{name}/adapter"), kind="adapter", published=True)
        results = {}
        for source, commands in SOURCES.items():
            for name in commands:
                result = _run_command(name, source)
                assert result.code == 0, f"{name}: {result.err}"
                for path in Path().glob("out*"):
                    _remove(path)
                results[f"{source} {name}"] = result
        Path("results.json").write_text(json.dumps(results))


def cases(seed: int) -> Iterator[Case]:
    """Yield the cases of a seed, without end; each kind of damage meets each command in turn."""
    pairs = [(source, command) for source, commands in SOURCES.items() for command in commands]
    weights = [RARE.get(command, 1.0) for _, command in pairs]
    order = random.Random(seed)
    for number in count():
        kind = [*DAMAGES][number % len(DAMAGES)]
        ((source, command),) = order.choices(pairs, weights)
        yield Case(seed, number, kind, command, source, with_checksums=order.random() < 0.25)


def try_case(case: Case, folder: Path) -> Outcome:
    """Damage a copy of the adapter of `case` in the prepared `folder`, run the command on it, and judge the result."""
    with _inside(folder):
        run = Path("runs") / case.source
        shutil.copytree(run, "runs/pristine")
        try:
            adapter = run / "adapter"
            if not case.with_checksums:  # as an adapter of another tool
                (adapter / CHECKSUMS_FILE).unlink(missing_ok=True)
                (run / CHECKSUMS_FILE).unlink()
            before = _contents(adapter)
            damage = DAMAGES[case.kind](adapter, random.Random(f"{case.seed} {case.number}"))
            result = _run_command(case.command, case.source)
            changed = _contents(adapter) != before
        finally:
            shutil.rmtree(run)
            Path("runs/pristine").rename(run)
            leftovers = [path for path in Path().iterdir() if path.name.startswith((".tmp", ".old", "out"))]
            for path in leftovers:
                _remove(path)
        expected = Result(*json.loads(Path("results.json").read_text())[f"{case.source} {case.command}"])
    return Outcome(_judge(case, result, expected, changed, leftovers), damage, "\n".join(result.err.splitlines()[-3:]))


def _judge(case: Case, result: Result, expected: Result, changed: bool, leftovers: list[Path]) -> str:
    if result.code is None:
        return "hang" if "TimeoutError" in result.err else "traceback"
    if result.code in (1, 2):
        lines = result.err.splitlines()[-2:]
        if [line.partition(": ")[0] for line in lines] != ["error", "hint"]:
            return "traceback"
        kept = [path for path in leftovers if path.name != "out"] if case.command == "train from" else leftovers
        return "leftovers" if kept else "refused"
    if _without_figures(result.err) - _without_figures(expected.err):
        return "told"
    if result.digest == expected.digest and not (case.with_checksums and changed):
        return "unchanged"
    return "silent"


def _without_figures(lines: str) -> set[str]:
    """Return the lines without their numbers: a line with another figure tells nothing."""
    return {re.sub(r"[-+]?[\d.,]+(e[-+]?\d+)?", "#", line) for line in lines.splitlines()}


def _run_command(name: str, source: str) -> Result:
    arguments, output = COMMANDS[name](Path("runs") / source)
    return _run(arguments, output)


def _run(arguments: list[str], output: Path | None) -> Result:
    """Run a command in this process, with one question as standard input."""
    out, err = io.StringIO(), io.StringIO()
    streams, argv = (sys.stdin, sys.stdout, sys.stderr), sys.argv
    sys.stdin, sys.stdout, sys.stderr = io.StringIO("What is the answer?\n"), out, err
    sys.argv = ["lora", *arguments]
    code: int | None = 0
    try:
        with _time_limit():
            cli.main()
        (out.getvalue() + err.getvalue()).encode()  # as a terminal does
    except SystemExit as exit_request:
        code = int(exit_request.code or 0)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - what the campaign looks for; panics of Rust are no Exceptions
        code = None
        err.write(traceback.format_exc())
    finally:
        sys.stdin, sys.stdout, sys.stderr, sys.argv = *streams, argv
    data = out.getvalue().encode(errors="replace")
    if output is not None:
        data = output.read_bytes() if output.is_file() else b""
    return Result(code, err.getvalue(), sha256(data).hexdigest())


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, with its own cache of encoded rows."""
    before, cache = Path.cwd(), os.environ.get("LORA_CACHE")
    os.chdir(folder)
    os.environ["LORA_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        os.chdir(before)
        if cache is None:
            del os.environ["LORA_CACHE"]
        else:
            os.environ["LORA_CACHE"] = cache


def _contents(folder: Path) -> Mapping[str, object]:
    """Return what each entry of `folder` is: the bytes of a file, the target of a link, the mode of another."""
    found: dict[str, object] = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            found[path.name] = path.readlink()
        else:
            found[path.name] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
