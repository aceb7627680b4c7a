"""The held-out evaluation rows of the run that trained an adapter: probes for merging, prompts for exporting."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lora_cli.data.collate import Batch
from lora_cli.data.dataset import EncodedDataset
from lora_cli.data.label_mask import IGNORE_INDEX
from lora_cli.errors import LoraError
from lora_cli.merging.verify import Probes
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.run.folder import recipe_of_adapter
from lora_cli.setup.inputs import RunInputs, batch_plan, load_inputs

PROBE_ROWS = 8  # rows that models are compared on
MAX_POSITIONS = 400  # outputs that are compared: the logits of a large vocabulary take much memory
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

    def probes(self) -> Probes | None:
        """Return batches of the first rows, one row each; None if the run's rows cannot be loaded.

        Raises:
            LoraError: the config of a seq2seq model has no decoder_start_token_id.
        """
        if self._run is None:
            return None
        recipe, inputs, rows, held_out = self._run
        plan = batch_plan(recipe, inputs, rows, batches_per_step=1)
        batches: list[Batch] = []
        for number in range(min(PROBE_ROWS, len(rows))):
            batches.append(plan.make_batch([number]))
            if sum(len(batch.label_positions) for batch in batches) > MAX_POSITIONS:
                break
        outputs = sum(len(batch.label_positions) for batch in batches)
        kind = "held-out" if held_out else "training"
        return Probes(batches, f"{len(batches)} {kind} rows ({outputs} {TASKS[recipe.task].unit}s)")

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
