"""Cache of tokenized rows: reused, rebuilt if an input changes, safe with concurrent and killed processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_cli.data import cache
from lora_cli.data.encode import CausalLMEncoder
from lora_cli.data.prepare import PreparedData
from tests.inputs.tiny_tokenizers import CHATML, MARKED, MARKED_SHORT, build

ROWS = "".join(json.dumps({"text": f"the answer {i} is capital"}) + "\n" for i in range(50))


def cache_entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache/encoded").iterdir() if not path.name.startswith(".lock-"))


def count_encoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    encode = CausalLMEncoder.encode

    def counted(self: CausalLMEncoder, examples, rendering=None):
        calls.append(len(examples))
        return encode(self, examples, rendering)

    monkeypatch.setattr(CausalLMEncoder, "encode", counted)
    return calls


def same(one: PreparedData, two: PreparedData) -> bool:
    return (one.fingerprint, one.ledger) == (two.fingerprint, two.ledger)


def test_a_second_run_encodes_nothing(prepared, chatml, monkeypatch, tmp_path):
    calls = count_encoding(monkeypatch)
    first = prepared(chatml, files={"train.jsonl": ROWS}, eval=0.2)
    assert calls == [50]
    assert same(first, prepared(chatml, eval=0.2))
    # The selection of rows is not part of the cache key.
    prepared(chatml, eval=0.5, seed=3, train=[{"path": "train.jsonl", "weight": 2.5}])
    assert calls == [50]
    assert len(cache_entries(tmp_path)) == 1


def test_a_moved_file_keeps_its_rows_and_gets_its_new_name(prepared, chatml, monkeypatch, tmp_path):
    prepared(chatml, files={"train.jsonl": ROWS})
    calls = count_encoding(monkeypatch)
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    assert prepared(chatml, train="moved.jsonl").train[7].where == "moved.jsonl:8"
    assert calls == []


def test_every_input_that_changes_rows_gives_a_new_entry(prepared, tmp_path):
    special = ("<|im_start|>",)
    chat = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    tokenizer = build(*special, eos="<|im_end|>", template=CHATML)
    changes = [
        {"files": {"train.jsonl": chat}},
        {"files": {"train.jsonl": chat + "\n\n"}},
        {"loss_on": "all"},
        {"max_length": 500},
        {"overlong": "drop"},
        {"on_bad_row": "skip"},
        {"format": "messages"},
        {"chat_template": MARKED},
        {"tokenizer": build(*special, eos="<|im_end|>", template=MARKED_SHORT)},
        {"tokenizer": build(*special, eos="<|im_end|>", template=CHATML, vocabulary=390)},
    ]
    for number, change in enumerate(changes, 1):
        prepared(**{"tokenizer": tokenizer, **change})
        assert len(cache_entries(tmp_path)) == number, change


def test_a_damaged_entry_is_built_again(prepared, chatml, tmp_path):
    first = prepared(chatml, files={"train.jsonl": ROWS})
    (folder,) = (path for path in (tmp_path / "cache/encoded").iterdir() if not path.name.startswith("."))
    for name, content in (("part-00000.arrow", b"ARROW1"), ("tally.json", b"{"), ("part-00000.arrow", b"")):
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        assert same(first, prepared(chatml))


def test_a_rejected_source_leaves_nothing(prepared, chatml, tmp_path):
    with pytest.raises(Exception, match="is bad"):
        prepared(chatml, files={"train.jsonl": ROWS + "nope\n"})
    assert cache_entries(tmp_path) == []


# A process that prepares rows slowly, so that another one can run at the same time.
WORKER = """
import sys, time
from pathlib import Path
from lora_cli.data import cache
from lora_cli.data.encode import CausalLMEncoder
from lora_cli.data.prepare import prepare_data
from lora_cli.recipe.schema import DataSpec
from lora_cli.training.cpu import peak_resident_memory
from tests.inputs.tiny_tokenizers import CHATML, build

cache.ROWS_PER_BATCH = 5
encode = CausalLMEncoder.encode
def slow(self, examples, rendering=None):
    time.sleep(0.05)
    print("batch", flush=True)
    return encode(self, examples, rendering)
CausalLMEncoder.encode = slow
tokenizer = build("<|im_start|>", "<|endoftext|>", "<think>", "</think>", eos="<|im_end|>", template=CHATML)
data = prepare_data(DataSpec(train="train.jsonl", eval=None), tokenizer, seed=0, cache=Path("cache"), info=print)
print(data.fingerprint, flush=True)
"""


def worker(folder: Path) -> "subprocess.Popen[str]":
    root = str(Path(cache.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )


@pytest.mark.slow
def test_two_concurrent_processes_encode_once(prepared, chatml, tmp_path):
    (tmp_path / "train.jsonl").write_text(ROWS)
    outputs = [process.communicate(timeout=600)[0].splitlines() for process in [worker(tmp_path), worker(tmp_path)]]
    assert sum(line == "batch" for lines in outputs for line in lines) == 10
    assert outputs[0][-1] == outputs[1][-1] == prepared(chatml).fingerprint
    assert len(cache_entries(tmp_path)) == 1


@pytest.mark.slow
def test_a_killed_process_leaves_no_partial_entry(prepared, chatml, tmp_path):
    (tmp_path / "train.jsonl").write_text(ROWS)
    process = worker(tmp_path)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "batch\n":
        assert line, "the process ended before the first batch"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name.startswith(".unfinished-") for name in cache_entries(tmp_path)] == [True]
    started = time.monotonic()
    data = prepared(chatml)
    assert time.monotonic() - started < 60  # the lock of the killed process is released
    assert len(data.train) == 50
    assert [name.startswith(".") for name in cache_entries(tmp_path)] == [False]


MEMORY = """
import sys
from pathlib import Path
from lora_cli.data.prepare import prepare_data
from lora_cli.recipe.schema import DataSpec
from lora_cli.training.cpu import peak_resident_memory
from tests.inputs.tiny_tokenizers import CHATML, build

tokenizer = build("<|im_start|>", eos="<|im_end|>", template=CHATML)
def run(name):
    return prepare_data(DataSpec(train=name, eval=0.01), tokenizer, seed=0, cache=Path("cache"), info=print)
run("small.jsonl")
before = peak_resident_memory()
print(len(run("large.jsonl").train), (peak_resident_memory() - before) / 2**20, "pandas" in sys.modules)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """8,000 rows with 15 MB of text and 15 MB of ids need much less memory than either, because only the index grows.

    The rows repeat a few words, because the tokenizer's cache of words grows with each new one. The first rows fill the
    buffers of the threads.
    """
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for name, count in (("small", 4_000), ("large", 8_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                number = " ".join(digits[int(digit)] for digit in f"{i:05}")
                file.write(json.dumps({"text": number + " the capital answer" * 100}) + "\n")
    root = str(Path(cache.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows, growth, with_pandas = done.stdout.splitlines()[-1].split()
    assert int(rows) > 7_900
    assert float(growth) < 10, "MiB"
    assert with_pandas == "False", "pyarrow imports it where it converts numbers by itself"


@pytest.mark.parametrize("kind", ["text", "labels", "bad rows"])
def test_an_interrupted_encoding_continues_where_it_was(prepared, chatml, monkeypatch, tmp_path, kind):
    if kind == "labels":
        rows = "".join(json.dumps({"text": f"text {i}", "label": f"label {i % 7}"}) + "\n" for i in range(50))
    else:
        rows = ROWS.replace("answer 3 ", "\\ud800") if kind == "bad rows" else ROWS
    section = {"on_bad_row": "skip", "task": "seq-cls" if kind == "labels" else "causal-lm"}
    whole = prepared(chatml, files={"train.jsonl": rows}, **section)
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 5)
    monkeypatch.setattr(cache, "BATCHES_PER_PART", 2)
    shutil.rmtree(tmp_path / "cache")
    batches = interrupt_after(monkeypatch, 7)
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prepared(chatml, **section)
    resumed = prepared(chatml, **section, info=told.append)
    assert "train.jsonl: continuing after 30 rows, which were encoded before" in told
    assert len(batches) == 7 + 1 + 4  # three files of two batches were complete
    assert same(whole, resumed)
    assert [row.where for row in resumed.train] == [row.where for row in whole.train]
    assert [row.labels.tolist() for row in resumed.train] == [row.labels.tolist() for row in whole.train]
    prepared(chatml, **section)
    assert len(batches) == 12


def test_an_interruption_behind_the_last_row_changes_no_count(prepared, chatml, monkeypatch, tmp_path):
    template = chatml.chat_template.replace("message['content']", "(message.name or '') + message['content']")
    turns = [{"role": "user", "content": "q", "name": "Eve", "time": 3}, {"role": "assistant", "content": "a"}]
    files = {"train.jsonl": "".join(json.dumps({"messages": turns, "id": i}) + "\n" for i in range(7))}
    whole = prepared(chatml, files=files, chat_template=template)
    expected = entry_files(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cache.Tally, "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(chatml, chat_template=template)
    resumed = prepared(chatml, chat_template=template)
    assert resumed.ledger.entries[0].tally == whole.ledger.entries[0].tally
    assert "  message keys not used: time (7 messages)" in resumed.ledger.table()
    assert entry_files(tmp_path / "cache") == expected


def entry_files(cache: Path) -> dict[str, bytes]:
    (entry,) = (cache / "encoded").glob("[!.]*")
    return {path.name: path.read_bytes() for path in entry.iterdir()}


def interrupt(tally: cache.Tally) -> None:
    raise KeyboardInterrupt


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Let the encoding of the batch after `count` fail once; return a list that gets the rows of each batch."""
    batches: list[int] = []
    encode = cache._results

    def interrupted(parsed, encoder, *, parse_only):
        batches.append(len(parsed))
        if len(batches) == count + 1:
            raise KeyboardInterrupt
        return encode(parsed, encoder, parse_only=parse_only)

    monkeypatch.setattr(cache, "_results", interrupted)
    return batches


def test_a_damaged_unfinished_encoding_starts_anew(prepared, chatml, monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 5)
    monkeypatch.setattr(cache, "BATCHES_PER_PART", 2)
    first = prepared(chatml, files={"train.jsonl": ROWS})
    shutil.rmtree(tmp_path / "cache")
    interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        prepared(chatml)
    (unfinished,) = (tmp_path / "cache/encoded").glob(".unfinished-*")
    (unfinished / "part-00000.arrow").write_bytes(b"ARROW1")
    told: list[str] = []
    assert same(first, prepared(chatml, info=told.append))
    assert not any("continuing" in line for line in told)
