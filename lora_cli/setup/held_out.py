"""The held-out evaluation rows of the run that trained an adapter: probes for merging, prompts for exporting."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.encoded_rows import Row
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.errors import LoraError
from lora_cli.merging.verify import Probes
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.tasks import TaskName
from lora_cli.run import console
from lora_cli.run.folder import recipe_of_adapter
from lora_cli.setup.inputs import RunInputs, collate_for, load_inputs

PROBE_ROWS = 8  # rows that models are compared on, if they may be as long as this:
PROBE_ROW_TOKENS = 32
PROMPTS = 8  # prompts that an exported model continues
MAX_PROMPT_TOKENS = 512


class RunRows(NamedTuple):
    """The rows of a run, loaded again from its recipe."""

    recipe: Recipe
    inputs: RunInputs
    rows: EncodedDataset  # held out for evaluation, else the training rows
    held_out: bool


class HeldOutRows:
    """Rows that the run of an adapter held out, loaded on first use and cached."""

    def __init__(self, adapter: Path) -> None:
        """`adapter` is the folder of the adapter, or of a checkpoint, of a run."""
        self._recipe_file = recipe_of_adapter(adapter)

    @cached_property
    def _run(self) -> RunRows | None:
        if self._recipe_file is None:
            return None
        try:
            recipe = load_recipe(self._recipe_file)
            inputs = load_inputs(recipe, info=console.no_output, weights=False)
        except LoraError as reason:
            console.info(f"cannot load the run's held-out rows ({reason.message}); using synthetic rows")
            return None
        held_out = inputs.data.eval is not None
        return RunRows(inputs.recipe, inputs, inputs.data.eval or inputs.data.train, held_out)

    def probes(self, tokens: int) -> Probes | None:
        """Return the first rows, cut to `tokens` tokens together and padded; None if the rows cannot be loaded.

        Raises:
            LoraError: the config of a seq2seq model has no decoder_start_token_id.
        """
        if self._run is None:
            return None
        recipe, inputs, rows, held_out = self._run
        count = min(PROBE_ROWS, len(rows), max(2, tokens // PROBE_ROW_TOKENS))
        cut = [_cut(rows[number], tokens // count, recipe.task) for number in range(count)]
        assert inputs.base.pad_id is not None
        batch = collate_for(inputs.base, packing=False)(cut, range(count), inputs.base.pad_id)
        kind = "held-out" if held_out else "training"
        return Probes(batch, f"{count} {kind} rows ({len(batch.label_positions)} {TASKS[recipe.task].unit}s)")

    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Return the token ids of the first rows up to their answer; empty if no row has a prompt or can be loaded."""
        if self._run is None or self._run.recipe.task != "causal-lm":
            return ()
        prompts: list[tuple[int, ...]] = []
        for row in self._run.rows:
            supervised = (row.labels != IGNORE_INDEX).nonzero()[0]
            if len(supervised) and 0 < supervised[0] <= MAX_PROMPT_TOKENS:
                prompts.append(tuple(row.input_ids[: supervised[0]].tolist()))
            if len(prompts) == PROMPTS:
                break
        return tuple(prompts)


def _cut(row: Row, length: int, task: TaskName) -> Row:
    """Return at most `length` tokens of a row: in causal-lm those up to its last label, else the first ones."""
    kept = slice(length)
    if task == "causal-lm":
        stop = int((row.labels != IGNORE_INDEX).nonzero()[0][-1]) + 1
        kept = slice(max(0, stop - length), stop)
    return Row(
        row.input_ids[kept],
        row.labels if task == "seq-cls" else row.labels[kept],
        row.where,
        max(0, row.pair_tokens - max(0, len(row.input_ids) - length)),
    )
