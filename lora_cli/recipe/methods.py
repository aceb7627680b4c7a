"""Adapter methods (LoRA, DoRA, PiSSA, ...): options with defaults, and what each can be combined with. No torch."""

from typing import Any, Literal, NamedTuple

from lora_cli.recipe.tasks import EVERY_TASK, TaskName

MethodName = Literal[
    "lora",
    "rslora",
    "dora",
    "lora+",
    "scaled",
    "pissa",
    "olora",
    "corda",
    "eva",
    "loftq",
    "adalora",
    "vera",
    "loha",
    "lokr",
    "ia3",
    "oft",
    "boft",
    "prefix",
    "prompt",
    "p-tuning",
]


class MethodFacts(NamedTuple):
    """Facts of one adapter method, without PEFT; its PEFT configuration is in `model/peft_config.py: METHODS`."""

    summary: str  # one line, printed by `lora methods`
    options: dict[str, Any]  # keys of the adapter section that it supports, with their defaults
    bits: tuple[int, ...] = (4, 8)  # bits of the bitsandbytes bases that it can train on
    needs_bits: int | None = None  # bits of the quantized base that it requires
    no_quantization_reason: str = ""  # why `bits` is empty
    tasks: tuple[TaskName, ...] = EVERY_TASK
    supports_packing: bool = True
    mergeable: bool = True  # into the weights of the base
    lora_config: bool = False  # whether it is PEFT's LoraConfig
    adapts_experts: bool = False  # whether it can adapt the stacked weights of experts, which are no linear layers
    shardable: bool = True  # whether it can be created and trained on a base that is sharded over processes


TARGET_OPTIONS: dict[str, Any] = {"target_modules": "all-linear", "exclude_modules": None, "layers": None}
FULLY_TRAINED_OPTIONS: dict[str, Any] = {"modules_to_save": None}
LORA_OPTIONS: dict[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.05,
    **TARGET_OPTIONS,
    "rank_pattern": None,
    "alpha_pattern": None,
    "bias": "none",
    **FULLY_TRAINED_OPTIONS,
    "trainable_tokens": None,
    "freeze_a": False,
}
# Methods that initialize A and B from the weights support neither a frozen A nor trainable tokens.
WEIGHT_INIT_OPTIONS: dict[str, Any] = {
    key: value for key, value in LORA_OPTIONS.items() if key not in ("freeze_a", "trainable_tokens")
}
VIRTUAL_TOKEN_OPTIONS: dict[str, Any] = {"virtual_tokens": 20}
INIT_FROM_FULL_WEIGHTS = "it is initialized from unquantized weights; loftq is the equivalent for a 4-bit base"
FULL_WEIGHTS_ONLY = "PEFT supports it on unquantized weights only"

METHOD_FACTS: dict[MethodName, MethodFacts] = {
    "lora": MethodFacts(
        "low-rank update: W + alpha/rank·BA (arXiv:2106.09685)", LORA_OPTIONS, lora_config=True, adapts_experts=True
    ),
    "rslora": MethodFacts(
        "LoRA scaled by alpha/sqrt(rank), so that large ranks still train well (arXiv:2312.03732)",
        LORA_OPTIONS,
        lora_config=True,
        adapts_experts=True,
    ),
    "dora": MethodFacts(
        "LoRA on the direction of W, with a separately trained magnitude (arXiv:2402.09353)",
        LORA_OPTIONS,
        bits=(4,),
        lora_config=True,
    ),
    "lora+": MethodFacts(
        "LoRA with a learning rate for B of lr_ratio times that of A (arXiv:2402.12354)",
        {**LORA_OPTIONS, "lr_ratio": 16.0},
        lora_config=True,
        adapts_experts=True,
    ),
    "scaled": MethodFacts(
        "LoRA with a trained factor s for each output row: W + diag(s)·BA; s is saved merged into B",
        LORA_OPTIONS,
        lora_config=True,
    ),
    "pissa": MethodFacts(
        "LoRA with A and B initialized to the principal components of W (arXiv:2404.02948)",
        WEIGHT_INIT_OPTIONS,
        bits=(),
        no_quantization_reason=INIT_FROM_FULL_WEIGHTS,
        lora_config=True,
    ),
    "olora": MethodFacts(
        "LoRA with A and B initialized from the QR decomposition of W (arXiv:2406.01775)",
        WEIGHT_INIT_OPTIONS,
        bits=(),
        no_quantization_reason=INIT_FROM_FULL_WEIGHTS,
        lora_config=True,
    ),
    "corda": MethodFacts(
        "LoRA with A and B initialized to the components of W most important for the training rows (arXiv:2406.05223)",
        WEIGHT_INIT_OPTIONS,
        bits=(),
        no_quantization_reason=INIT_FROM_FULL_WEIGHTS,
        lora_config=True,
        shardable=False,
    ),
    "eva": MethodFacts(
        "LoRA with A initialized to the principal components of the layer inputs on training rows (arXiv:2410.07170)",
        {key: value for key, value in WEIGHT_INIT_OPTIONS.items() if key not in ("rank_pattern", "alpha_pattern")},
        lora_config=True,
    ),
    "loftq": MethodFacts(
        "LoRA with A and B initialized to the best low-rank fit of the quantization error (arXiv:2310.08659)",
        WEIGHT_INIT_OPTIONS,
        bits=(4,),
        needs_bits=4,
        lora_config=True,
        shardable=False,
    ),
    "adalora": MethodFacts(
        "LoRA that starts at rank and drops the least important components to a mean of final_rank (arXiv:2303.10512)",
        {
            **{
                key: value
                for key, value in LORA_OPTIONS.items()
                if key not in ("rank_pattern", "alpha_pattern", "freeze_a", "trainable_tokens")
            },
            "final_rank": 8,
        },
    ),
    "vera": MethodFacts(
        "shared random A and B, with two trained vectors per layer (arXiv:2310.11454)",
        {"rank": 256, "dropout": 0.0, **TARGET_OPTIONS, "bias": "none", **FULLY_TRAINED_OPTIONS},
    ),
    "loha": MethodFacts(
        "update is the Hadamard product of two low-rank products (arXiv:2108.06098)",
        {"rank": 16, "alpha": 32.0, "dropout": 0.0, **TARGET_OPTIONS, **FULLY_TRAINED_OPTIONS},
        bits=(),
        no_quantization_reason=FULL_WEIGHTS_ONLY,
    ),
    "lokr": MethodFacts(
        "update is the Kronecker product of a small and a low-rank matrix (arXiv:2309.14859)",
        {"rank": 16, "alpha": 32.0, "dropout": 0.0, **TARGET_OPTIONS, **FULLY_TRAINED_OPTIONS},
        bits=(),
        no_quantization_reason=FULL_WEIGHTS_ONLY,
    ),
    "ia3": MethodFacts(
        "trained scaling vectors on keys, values and the inputs of the last MLP layer (arXiv:2205.05638)",
        {"target_modules": None, "exclude_modules": None, "feedforward_modules": None, **FULLY_TRAINED_OPTIONS},
    ),
    "oft": MethodFacts(
        "W multiplied by a trained block-diagonal rotation (arXiv:2306.07280, arXiv:2506.19847)",
        {"rotation_size": 32, **TARGET_OPTIONS, "bias": "none", **FULLY_TRAINED_OPTIONS},
    ),
    "boft": MethodFacts(
        "W multiplied by a trained product of sparse (butterfly) rotations (arXiv:2311.06243)",
        {
            "rotation_size": 4,
            "butterflies": 1,
            "dropout": 0.0,
            **TARGET_OPTIONS,
            "bias": "none",
            **FULLY_TRAINED_OPTIONS,
        },
    ),
    "prefix": MethodFacts(
        "trained keys and values of virtual tokens before the first token (arXiv:2101.00190)",
        VIRTUAL_TOKEN_OPTIONS,
        supports_packing=False,
        mergeable=False,
    ),
    "prompt": MethodFacts(
        "trained embeddings of virtual tokens before the first token (arXiv:2104.08691)",
        {**VIRTUAL_TOKEN_OPTIONS, "init_text": None},
        supports_packing=False,
        mergeable=False,
    ),
    "p-tuning": MethodFacts(
        "embeddings of virtual tokens before the first token, computed by a small trained network (arXiv:2103.10385)",
        {**VIRTUAL_TOKEN_OPTIONS, "hidden_size": 128},
        supports_packing=False,
        mergeable=False,
    ),
}
