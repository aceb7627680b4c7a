"""Write the adapter of a run: with its tokenizer and records, loaded back and compared before it is put in place."""

from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from lora_cli.data.class_labels import save_labels
from lora_cli.data.collate import Batch
from lora_cli.model.loss import LossFunction
from lora_cli.model.save_adapter import compare_reloaded, save_adapter
from lora_cli.model.sharding import free_gathered
from lora_cli.model.trained_on import TrainedOn, write_trained_on
from lora_cli.recipe.schema import Recipe
from lora_cli.run.checksums import verified_folder
from lora_cli.setup.inputs import RunInputs


class AdapterWriter(NamedTuple):
    """The model of a run, and what its adapter's folder has beside the weights."""

    model: PeftModel
    recipe: Recipe
    inputs: RunInputs
    trained_on: TrainedOn  # but for the step

    def write_files(self, folder: Path, step: int) -> None:
        """Write a plain PEFT adapter into `folder`, with the tokenizer that it was trained with."""
        spec, base = self.recipe.model, self.inputs.base
        save_adapter(self.model, folder, base=spec.path, revision=spec.revision)
        base.tokenizer.save_pretrained(str(folder))
        write_trained_on(self.trained_on._replace(step=step), folder)
        if base.labels is not None:
            save_labels(base.labels, folder)

    def write_verified(self, target: Path, step: int, *, model_card: str, probe: Batch) -> str:
        """Write the adapter to a temporary folder, load it back, compare it, then move it to `target`.

        Args:
            target: folder of the adapter; an existing one is replaced.
            step: that it was trained to.
            model_card: README.md.
            probe: a batch on which the logits are compared.

        Returns:
            A line on the comparison.

        Raises:
            LoraError: the adapter on disk is not the trained one.
        """
        with verified_folder(target, kind="adapter", published=True, replace=True) as partial:
            self.write_files(partial, step)
            (partial / "README.md").write_text(model_card, encoding="utf-8")
            difference = compare_reloaded(self.model, partial, lambda model: self._logits(model, probe))
            difference.check(self.inputs.base.dtype)
        logits = f", logits within {difference.logits:.0e}" if difference.logits else ""
        return f"verified: the adapter on disk, loaded back, equals the trained model (difference 0{logits})"

    def verify_along(self, probe: Batch) -> None:
        """Run the model as often as `write_verified` does, which the first process calls, to gather a sharded base."""
        for _ in range(2):
            self._logits(self.model, probe)

    @torch.no_grad()
    def _logits(self, model: PeftModel, probe: Batch) -> Tensor:
        """Return the logits of `probe` in eval mode: fp64 [units, outputs]."""
        model.eval()
        free_gathered(model)
        return LossFunction(model, task=self.recipe.task).logits(probe).double()
