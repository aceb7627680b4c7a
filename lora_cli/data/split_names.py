"""Tell the split (train, validation, test) of a dataset's files by their names, as the Hugging Face hub does. No torch.

The keywords are those of `datasets.data_files`: a word of the file's or of a folder's name, `train-00000-of-00003`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from lora_cli.errors import LoraError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in KEYWORDS.items() for word in words}
SHARD = re.compile(r"(?P<name>.+?)-(?P<number>\d{3,})-of-(?P<total>\d{3,})(?=\.)")  # train-00000-of-00003.parquet


def group_by_split(files: Iterable[str]) -> dict[str | None, list[str]]:
    """Return the files of each split, None for files whose names tell none; `files` are paths within the dataset.

    Shards named `train_sft-...` and `train_gen-...` are two splits of these names; where there is only one such name,
    it is the split train.

    Raises:
        LoraError: a name has the words of two splits.
    """
    groups: dict[str | None, list[str]] = defaultdict(list)
    variants: dict[str | None, set[str]] = defaultdict(set)
    for file in files:
        split = _split_of(file)
        shard = SHARD.match(PurePosixPath(file).name)
        variants[split].add(shard["name"] if shard and re.fullmatch(r"\w+(\.\w+)*", shard["name"]) else "")
        groups[split].append(file)
    for split in [split for split, names in variants.items() if split and len(names) > 1 and "" not in names]:
        for file in groups.pop(split):
            shard = SHARD.match(PurePosixPath(file).name)
            groups[shard["name"] if shard else split].append(file)
    return dict(groups)


def _split_of(file: str) -> str | None:
    words = re.split(r"[^a-z]+", file.lower())
    found = sorted({SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD})
    if len(found) > 1:
        raise LoraError(
            f"data: {file} has the words of two splits in its name: {' and '.join(found)}",
            hint="rename it, or write the files of a split as path: DIR/train*.jsonl",
        )
    return found[0] if found else None


def select_split(where: str, files: Sequence[str], *, split: str | None, default: Sequence[str]) -> str | None:
    """Return the split to read: `split`, else the first of `default` that there is; None if names tell no splits.

    Args:
        where: the folder or glob, for messages.
        files: paths within the dataset.
        split: the split that the recipe names.
        default: splits in the order of preference.

    Raises:
        LoraError: there is no such split, or a name has the words of two splits or, next to evaluation files, of none.
    """
    groups = group_by_split(files)
    named = [name for name in groups if name is not None]
    if not named:
        if split is not None:
            raise LoraError(
                f"data: {where} has no split {split!r}: its file names tell no splits",
                hint="remove `split`, or set the path to the file of that split",
            )
        return None
    if split is not None:
        # `validation` is a split of `dev.jsonl` too, and `dev` of `validation.jsonl`.
        name = split if split in groups else SPLIT_OF_WORD.get(split, split)
        if name not in groups:
            raise LoraError(f"data: {where} has no split {split!r}", hint=f"set `split` to one of {', '.join(named)}")
        return name
    if None in groups and named != ["train"]:
        raise LoraError(
            f"data: {where}: the name of {groups[None][0]} tells no split, others tell {' and '.join(sorted(named))}",
            hint=f"set `split` to one of {', '.join(named)}, or write the path of each file",
        )
    chosen = next((name for name in default if name in groups), None)
    if chosen is None:
        raise LoraError(
            f"data: {where} has no {' or '.join(default)} files, only {', '.join(named)}",
            hint=f"set `split` to one of {', '.join(named)}, or write the path of a file",
        )
    return chosen


def files_of_split(files: Sequence[str], split: str | None, *, named: bool) -> list[str]:
    """Return the files of a split that `select_split` returned; `named`: the recipe names the split.

    Files whose names tell no split belong to train, unless the recipe names the split.
    """
    groups = group_by_split(files)
    if split is None or (not named and None in groups):
        return list(files)
    return groups[split]


def check_shards(where: str, files: Iterable[str]) -> None:
    """Check that no shard of `train-00000-of-00003.parquet` is missing.

    Raises:
        LoraError: a shard is missing.
    """
    numbers: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for file in files:
        path = PurePosixPath(file)
        if shard := SHARD.match(path.name):
            numbers[str(path.parent), shard["name"], shard["total"]].add(int(shard["number"]))
    for (folder, name, total), found in numbers.items():
        if missing := sorted(set(range(int(total))) - found):
            first = PurePosixPath(folder) / f"{name}-{missing[0]:0{len(total)}}-of-{total}"
            raise LoraError(
                f"data: {where}: {len(missing)} of {int(total)} shards of {name} are missing, the first is {first}",
                hint="download them, or write the shards to read as a list of paths",
            )
