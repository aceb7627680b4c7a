"""The train/eval split: hold out rows by a hash of their content, and repeat or sample rows by weight. No tokenizer."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lora_cli.errors import LoraError

Index = npt.NDArray[np.int64]  # [rows]
Hashes = npt.NDArray[np.uint64]  # [rows]


def held_out_masks(keys: Sequence[Hashes], *, share: float, seed: int) -> list[npt.NDArray[np.bool_]]:
    """Return a mask of the rows held out for evaluation for each source, bool [rows]. `keys` are hashes of the rows.

    Rows are selected by a hash of their content, so that identical rows are in the same split. Adding or removing rows
    does not move other rows, except to keep at least one row in each split.

    Raises:
        LoraError: `share` is not 0, but all rows are identical.
    """
    scores = [_hash(source, _salt(seed, "eval", 0)) for source in keys]
    if not share or sum(map(len, scores)) < 2:
        return [np.zeros(len(score), bool) for score in scores]
    lowest, highest = (int(extreme(np.concatenate(scores))) for extreme in (np.min, np.max))
    if lowest == highest:
        raise LoraError(
            "data.eval: all rows are identical, so none can be held out for evaluation",
            hint="set data.eval to null, or to a separate dataset",
        )
    limit = min(max(int(share * 2**64), lowest + 1), highest)
    return [score < np.uint64(limit) for score in scores]


def apply_weight(index: Index, weight: float, *, seed: int, split: str, number: int) -> Index:
    """Repeat all rows by the integer part of the weight, and a seeded selection of rows once for its fraction.

    `index` are the rows of source `number` of a split (train, eval); each source gets its own selection.
    """
    repeats, fraction = divmod(weight, 1.0)
    count = round(fraction * len(index))
    # By a hash of the index, not of the content, so that identical rows are selected independently.
    order = np.argsort(_hash(index.astype(np.uint64), _salt(seed, split, number)), kind="stable")
    return np.concatenate([np.tile(index, int(repeats)), np.sort(index[order[:count]])])


def _salt(seed: int, purpose: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _hash(values: Hashes, salt: int) -> Hashes:
    """Return a hash of each value (SplitMix64) that does not depend on the machine or the NumPy version."""
    mixed = values + np.uint64(salt)  # unsigned arrays wrap around on overflow, as the algorithm requires
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
