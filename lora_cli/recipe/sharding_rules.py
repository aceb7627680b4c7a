"""What cannot be trained on a base that is sharded over processes (distributed.strategy: fsdp or hsdp). No torch."""

from collections.abc import Iterator

from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.problem import Conflict
from lora_cli.recipe.schema import Recipe

KEY = "distributed.strategy"
OFFLOAD_KEY = "distributed.cpu_offload"
SHARDED = ("fsdp", "hsdp")  # strategies


def check_sharding(recipe: Recipe) -> Iterator[Conflict]:
    """Yield conflicts of `strategy: fsdp` or `hsdp`, and of `cpu_offload` without them."""
    strategy = recipe.distributed.strategy
    if strategy in SHARDED:
        yield from sharding_conflicts(recipe)
    elif recipe.distributed.cpu_offload:
        message = f"the base waits in host memory only if it is sharded, and strategy is {strategy}"
        yield Conflict(OFFLOAD_KEY, message, "write `strategy: fsdp` too, or false", (KEY,))


def sharding_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """Yield what keeps the base of a recipe from being sharded."""
    strategy = recipe.distributed.strategy
    name, fix = strategy if strategy in SHARDED else "fsdp", "write ddp"
    method = recipe.adapter.method
    if recipe.task != "causal-lm":
        yield Conflict(KEY, f"{name} is for causal-lm, not for {recipe.task}", fix, ("task",))
    if not METHOD_FACTS[method].shardable:
        message = f"{name} cannot shard the base of {method}, which is created from its full weights"
        yield Conflict(KEY, message, "write ddp, or another method", ("adapter.method",))
    if recipe.quantization is not None and recipe.quantization.bits == 8:
        yield Conflict(KEY, f"{name} cannot shard 8-bit weights", "write ddp, or bits: 4", ("quantization.bits",))
    if recipe.model.gguf == "packed":
        yield Conflict(
            KEY, f"{name} cannot shard a packed GGUF base", "write ddp, or gguf: dequantized", ("model.gguf",)
        )
    if recipe.adapter.bias not in (None, "none"):
        yield Conflict(KEY, f"{name} cannot train biases of the base", "write ddp, or bias: none", ("adapter.bias",))
    if recipe.model.new_tokens:
        yield Conflict(KEY, f"{name} cannot add model.new_tokens", fix, ("model.new_tokens",))
    if recipe.performance.compile is True:
        yield Conflict(KEY, f"{name} does not compile layers", "write ddp, or compile: false", ("performance.compile",))
