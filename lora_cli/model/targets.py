"""Which layers the adapter goes on: resolved against the model, counted, and refused where something does not match."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import LoraError


class Coverage(NamedTuple):
    """One kind of linear layer and how much of it carries the adapter."""

    kind: str  # last part of the layer's name: q_proj, ...
    matched: int  # layers of this kind with the adapter
    layers: int  # layers of this kind
    parameters: int  # trainable, in all of them


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer by full name, the output head left out: PEFT's `all-linear`."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def resolve(model: PreTrainedModel, wanted: str | Sequence[str]) -> str | list[str]:
    """`target_modules` as PEFT takes it, once every name has been seen to match.

    Raises:
        LoraError: a name or regex that matches no layer; the message lists the linear layers there are.
    """
    names = [name for name, _ in model.named_modules() if name]
    kinds = Counter(name.rpartition(".")[2] for name in linear_layers(model))
    listed = f"its linear layers are: {', '.join(sorted(kinds))}"
    if wanted == "all-linear":
        if not kinds:
            raise LoraError("adapter.target_modules: this model has no linear layers", hint="list its modules by name")
        return "all-linear"
    if isinstance(wanted, str) and wanted.isidentifier():
        wanted = [wanted]
    if isinstance(wanted, str):
        # PEFT matches a regex against the whole name.
        if not any(re.fullmatch(wanted, name) for name in names):
            raise LoraError(f"adapter.target_modules: the regex {wanted!r} matches no layer", hint=listed)
        return wanted
    missing = [w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names)]
    if missing:
        near = [m for w in missing for m in difflib.get_close_matches(w, kinds, n=1)]
        meant = f"did you mean {', '.join(near)}? " if near else ""
        raise LoraError(
            f"adapter.target_modules: {', '.join(missing)} match{'es' if len(missing) == 1 else ''} no layer",
            hint=meant + listed,
        )
    return list(wanted)


def coverage(layers: Mapping[str, nn.Module], adapted: Mapping[str, int]) -> list[Coverage]:
    """Per kind of layer, how many of `layers` are in `adapted` (full name → trainable parameters), largest first."""
    total = Counter(name.rpartition(".")[2] for name in layers)
    matched = Counter(name.rpartition(".")[2] for name in adapted)
    parameters: Counter[str] = Counter()
    for name, count in adapted.items():
        parameters[name.rpartition(".")[2]] += count
    kinds = sorted(total | matched, key=lambda kind: (-parameters[kind], kind))
    return [Coverage(kind, matched[kind], max(total[kind], matched[kind]), parameters[kind]) for kind in kinds]
