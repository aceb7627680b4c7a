"""Coverage of an adapter: the kinds of layers that carry it, and all other trained parameters, as lines and as JSON."""

from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn

from lora_cli.model import attach_adapter, expert_targets, multimodal, target_modules
from lora_cli.model.target_modules import Coverage
from lora_cli.recipe.schema import AdapterSpec


class AdapterCoverage(NamedTuple):
    """What an adapter trains."""

    kinds: list[Coverage]  # of the linear layers; empty for virtual tokens
    notes: list[str]  # on other trained parameters, and on layers that cannot have an adapter
    trainable: int  # parameters in total
    virtual_tokens: int = 0  # before each row

    def table(self) -> list[str]:
        """Return the lines of `lora check` and `lora train`."""
        total = f"  {self.trainable:,} trainable parameters in total"
        if self.virtual_tokens:
            return [f"adapter: {self.virtual_tokens} virtual tokens before each row", total]
        width = max((len(row.kind) for row in self.kinds), default=0)
        lines = [
            f"  {row.kind:{width}}  {row.matched:>4}/{row.layers} layers  {row.parameters:>13,} parameters"
            + (f", {row.experts:,} experts each" if row.experts else "")
            for row in self.kinds
        ]
        return ["adapter on:", *lines, *self.notes, total]

    def to_json(self) -> dict[str, Any]:
        """Return the coverage for manifest.json."""
        notes = [note.strip() for note in self.notes]
        kinds = [row._asdict() for row in self.kinds]
        return {"kinds": kinds, "notes": notes, "virtual_tokens": self.virtual_tokens}


def adapter_coverage(
    model: PeftModel, layers: dict[str, nn.Module], trainable: int, spec: AdapterSpec
) -> AdapterCoverage:
    """Return the coverage of the adapter of `model`.

    Args:
        model: with the adapter.
        layers: the linear layers of the base by full name, listed before the adapter was attached.
        trainable: number of trainable parameters.
        spec: of the adapter.
    """
    if model.active_peft_config.is_prompt_learning:
        return AdapterCoverage([], [], trainable, model.active_peft_config.num_virtual_tokens)
    base = model.get_base_model()
    outside = multimodal.outside_text(base)
    towers = [part.name for part in outside]
    text_layers = {name: layer for name, layer in layers.items() if not multimodal.is_inside(name, towers)}
    kinds = attach_adapter.coverage(model, text_layers)
    notes = []
    if others := trainable - sum(row.parameters for row in kinds):
        notes.append(f"  {others:,} other trainable parameters (heads, token embeddings, biases, vectors)")
    if bypassed := {name.rpartition(".")[2] for name in target_modules.bypassed_layers(base, layers)}:
        names = ", ".join(sorted(bypassed))
        notes.append(
            f"  {names} cannot have an adapter: {base.config.model_type} models multiply with the weight itself"
        )
    notes += expert_targets.describe_experts(model, spec)
    notes += multimodal.describe_outside(outside, layers)
    return AdapterCoverage(kinds, notes, trainable)
