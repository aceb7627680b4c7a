"""A damaged cache is told and made again, with the same rows; damage under a running process gives no wrong row."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lora_cli.data import cache
from lora_cli.data.prepare import PreparedData, prepare_data
from lora_cli.errors import LoraError
from lora_cli.recipe.schema import DataSpec
from tests.faults.damage import Damage, damages
from tests.inputs.tiny_tokenizers import CHATML, build

SEED = 1


def rows(first: int) -> str:
    return "".join(json.dumps({"text": f"the answer {i} is capital"}) + "\n" for i in range(first, first + 50))


@pytest.fixture(scope="module")
def tokenizer():
    return build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


@pytest.fixture(autouse=True)
def small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an entry of 50 rows have 4 files of 3 batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 5)
    monkeypatch.setattr(cache, "BATCHES_PER_PART", 3)
    (tmp_path / "train.jsonl").write_text(rows(0))
    (tmp_path / "other.jsonl").write_text(rows(50))


def prepare(tokenizer, train: str = "train.jsonl", folder: str = "cache") -> tuple[PreparedData, list[str]]:
    told: list[str] = []
    spec = DataSpec(train=train, eval=None)
    return prepare_data(spec, tokenizer, seed=0, cache=Path(folder), info=told.append), told


def contents(data: PreparedData) -> list[tuple[list[int], list[int], str]]:
    return [(row.input_ids.tolist(), row.labels.tolist(), row.where) for row in data.train]


def entries(folder: str = "cache") -> list[Path]:
    return sorted(path for path in Path(folder, "encoded").iterdir() if not path.name.startswith("."))


def restored(damage: Damage, intact: Path, relative: Path) -> None:
    """Put a copy of the intact cache at ./cache, and damage `relative` in it."""
    shutil.rmtree("cache", ignore_errors=True)
    shutil.copytree(intact, "cache", symlinks=True)
    damage.apply("cache" / relative)


@pytest.mark.slow
def test_a_damaged_entry_is_told_and_encoded_again(tokenizer, tmp_path: Path):
    first, _ = prepare(tokenizer)
    (entry,) = entries()
    prepare(tokenizer, "other.jsonl")
    (other,) = (path for path in entries() if path != entry)
    expected = contents(first)
    intact = Path(shutil.copytree("cache", tmp_path / "intact"))
    count = 0
    entry_in, other_in = (intact / path.relative_to("cache") for path in (entry, other))
    for damage in damages(entry_in, seed=SEED, other=other_in):
        restored(damage, intact, entry.relative_to("cache"))
        data, told = prepare(tokenizer)
        assert contents(data) == expected, damage.name
        silent = damage.name.startswith("remove-folder")
        assert silent or told[0].startswith(f"cache: {entry} is damaged: "), (damage.name, told)
        assert told[-1].startswith("train.jsonl: encoding"), damage.name
        assert prepare(tokenizer)[1] == [], damage.name  # what was made again is intact
        assert not [path.name for path in entry.parent.iterdir() if path.name.startswith((".tmp", ".unf"))], damage.name
        count += 1
    assert count > 60


def interrupted(monkeypatch: pytest.MonkeyPatch, tokenizer, folder: str = "cache", train: str = "train.jsonl") -> Path:
    """Interrupt the encoding after 2 of 4 files; return the folder of the unfinished entry."""
    encode, batches = cache._results, [0]

    def interrupt(*arguments, **options):
        batches[0] += 1
        if batches[0] > 7:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_results", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(tokenizer, train, folder)
    (unfinished,) = Path(folder, "encoded").glob(".unfinished-*")
    return unfinished


@pytest.mark.slow
def test_a_damaged_unfinished_encoding_is_told_and_starts_anew(tokenizer, tmp_path: Path, monkeypatch):
    expected = contents(prepare(tokenizer, folder="whole")[0])
    unfinished = interrupted(monkeypatch, tokenizer)
    other = interrupted(monkeypatch, tokenizer, "foreign", "other.jsonl")
    intact = Path(shutil.copytree("cache", tmp_path / "intact"))
    continued = 0
    for damage in damages(intact / unfinished.relative_to("cache"), seed=SEED, other=other):
        restored(damage, intact, unfinished.relative_to("cache"))
        data, told = prepare(tokenizer)
        assert contents(data) == expected, damage.name
        continues = any("continuing" in line for line in told)
        # Only what is no part of the progress may be damaged without a new start.
        harmless = ("stray-file", "part-00002")
        assert not continues or any(name in damage.name for name in harmless), damage.name
        continued += continues
        if not continues and "progress.json" in damage.name and not damage.name.startswith(("remove", "dangling")):
            assert f"cache: {unfinished} is damaged: " in told[0], damage.name
    assert continued >= 5  # a file that is not complete, and a file of another program


@pytest.mark.parametrize("name", ["tally.json", "part-00003.arrow", "progress.json"])
def test_a_damaged_entry_that_a_kill_left_as_unfinished_gives_no_wrong_rows(tokenizer, name: str):
    """After the exchange of both folders, and before the old one is deleted."""
    expected = contents(prepare(tokenizer)[0])
    (entry,) = entries()
    old = entry.rename(entry.with_name(f".unfinished-{entry.name}"))
    (old / name).write_bytes((old / "part-00000.arrow").read_bytes())
    (old / "part-00099.arrow").write_bytes((old / "part-00000.arrow").read_bytes())
    data, _ = prepare(tokenizer)
    assert contents(data) == expected
    assert not old.exists()
    assert prepare(tokenizer)[1] == []


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_lock_that_is_no_file_is_an_error(tokenizer, tmp_path: Path, kind: str):
    prepare(tokenizer)
    (entry,) = entries()
    shutil.rmtree(entry)
    lock = entry.with_name(f".lock-{entry.name}")
    lock.unlink()
    target = tmp_path / "precious"
    target.write_text("text")
    {"link": lambda: lock.symlink_to(target), "folder": lock.mkdir, "fifo": lambda: os.mkfifo(lock)}[kind]()
    with pytest.raises(LoraError) as caught:
        prepare(tokenizer)
    assert caught.value.message.startswith(f"the cache cannot be used: {lock}: ")
    assert caught.value.hint is not None
    assert "LORA_CACHE" in caught.value.hint
    assert target.read_text() == "text"


@pytest.fixture
def live(tokenizer) -> tuple[PreparedData, Path, list[tuple[list[int], list[int], str]]]:
    """Opened rows, the first of their files, and the rows as they were written."""
    data, _ = prepare(tokenizer)
    return data, entries()[0] / "part-00000.arrow", contents(data)


def test_rows_stay_readable_when_the_cache_is_removed(live):
    data, _, expected = live
    shutil.rmtree("cache")
    assert contents(data) == expected


def test_a_file_that_is_cut_off_while_rows_are_read_is_an_error(live):
    data, part, expected = live
    os.truncate(part, 200)
    with pytest.raises(LoraError, match=r"part-00000\.arrow was changed by another program") as caught:
        contents(data)
    assert caught.value.exit_code == 1
    assert data.train[20].input_ids.tolist() == expected[20][0]  # of the next file


def test_no_changed_row_is_read_as_another_row(live):
    """Flip bits in the open file: every row is as it was written, or an error."""
    data, part, expected = live
    written = part.read_bytes()
    errors = 0
    for at in range(0, len(written), 37):
        with part.open("r+b") as file:
            file.seek(at)
            file.write(bytes([written[at] ^ 1 << at % 8]))
            file.flush()
            for number in range(15):
                try:
                    row = data.train[number]
                except LoraError:
                    errors += 1
                else:
                    found = (row.input_ids.tolist(), row.labels.tolist(), row.where)
                    assert found == expected[number], (at, number)
            file.seek(at)
            file.write(written[at : at + 1])
    assert errors > 20
    assert contents(data) == expected


def test_rows_of_another_file_in_its_place_are_an_error(live):
    data, part, _ = live
    part.write_bytes(part.with_name("part-00001.arrow").read_bytes())
    with pytest.raises(LoraError, match="was changed by another program"):
        data.train[3]
