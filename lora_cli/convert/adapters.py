"""Variants of LoRA that other tools switch on by keys of their own, and the adapter method of each here. No torch."""

from lora_cli.convert.config import show
from lora_cli.convert.draft import Draft

INITIALIZATIONS = {"pissa": "pissa", "olora": "olora", "eva": "eva", "corda": "corda", "loftq": "loftq"}


def carry_lora_variant(
    draft: Draft,
    *,
    rslora: str = "",
    dora: str = "",
    pissa: str = "",
    plus: str = "",
    initialization: str = "",
) -> None:
    """Set adapter.method from the switches of the other tool; of several, only one can be carried.

    Args:
        draft: the recipe.
        rslora, dora, pissa: keys of switches; empty if the tool has none.
        plus: key of the learning rate ratio of LoRA+.
        initialization: key of PEFT's init_lora_weights.
    """
    config = draft.config
    chosen = ""
    for key, method in ((pissa, "pissa"), (dora, "dora"), (rslora, "rslora")):
        if not key or not config.has(key):
            continue
        if not config.switch(key):
            draft.same(key, "asks for nothing")
        elif chosen:
            draft.refuse(key, f"cannot be combined with {chosen}; accepted: {chosen} alone")
        else:
            chosen = method
            draft.carry(key, "adapter.method", method)
    if initialization:
        chosen = _carry_initialization(draft, initialization, chosen)
    ratio = config.number(plus) if plus else None
    if ratio and chosen:
        draft.refuse(plus, f"cannot be combined with {chosen}; accepted: {chosen} alone")
    elif ratio:
        draft.put("adapter.method", "lora+", plus)
        draft.carry(plus, "adapter.lr_ratio", float(ratio))


def _carry_initialization(draft: Draft, key: str, chosen: str) -> str:
    value = draft.config.get(key)
    name = str(value).lower().split("_niter")[0]
    if value is None or value is True or name == "true":
        draft.same(key, "the default: B is 0")
    elif name in INITIALIZATIONS and not chosen:
        draft.carry(key, "adapter.method", INITIALIZATIONS[name])
        return INITIALIZATIONS[name]
    else:
        kept = chosen or "PEFT's default"
        draft.refuse(key, f"{show(value)} is not an initialization here; accepted: {kept}", always=True)
    return chosen
