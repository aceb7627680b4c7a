"""The disk space that a run needs: checkpoints, adapter and logs, estimated before the first step."""

from math import ceil, prod
from pathlib import Path

from torch import nn

from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.run.disk_space import Need
from lora_cli.training.checkpoint_folders import list_checkpoints
from lora_cli.training.optimizer import state_bytes, trained_shapes

SMALLER = "free some space, set output to a folder on another disk, or lower training.keep_checkpoints"
RECORD_BYTES = 250  # of a step in the metrics log, about
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.jinja")


def run_needs(
    run: Path, model: nn.Module, spec: TrainingSpec, *, optimizer: str, base: Path, total: int, done: int = 0
) -> list[Need]:
    """Return what the rest of a run will have in its folder at the same time, at most, as far as it is not there yet.

    Trained parameters are saved in fp32. A new checkpoint is complete before an old one is deleted, so that one more
    than `keep_checkpoints` are there.

    Args:
        run: folder of the run; it may be missing.
        model: with the adapter that is trained; its weights are not read.
        spec: of the training.
        optimizer: its resolved name.
        base: folder of the base's tokenizer, of which each adapter gets a copy; it may be missing.
        total: steps of the run.
        done: steps that are done.
    """
    shapes = trained_shapes(model)
    adapter = 4 * sum(map(prod, shapes.values()))
    adapter += sum(file.stat().st_size for pattern in TOKENIZER_FILES for file in base.glob(pattern))
    every = spec.save_every or total
    saves = ceil(total / every) - done // every
    existing = len(list_checkpoints(run / "checkpoints"))
    most = spec.keep_checkpoints + 1 + (spec.keep == "best")
    new = max(min(most, existing + saves) - existing, int(saves > 0))
    return [
        Need(run, new * (adapter + state_bytes(optimizer, shapes)), f"{new} checkpoint{'s' * (new > 1)}"),
        Need(run, adapter, "the adapter"),
        Need(run, RECORD_BYTES * (total - done), "the log"),
    ]
