"""What each adapter method is, takes and allows: the facts that a recipe is checked by. No torch."""

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
    """One method, as a recipe's reader meets it. `model/attach_adapter.py: METHODS` has the PEFT side."""

    summary: str
    options: dict[str, Any]  # keys of the adapter section that it takes, each with its default
    bits: tuple[int, ...] = (4, 8)  # bases of bitsandbytes that it trains over
    needs_bits: int | None = None  # it is made for such a base and no other
    no_quantization: str = ""  # why it takes no quantised base, where it takes none
    tasks: tuple[TaskName, ...] = EVERY_TASK
    packs: bool = True  # rows may be packed
    merges: bool = True  # its weights can be folded into the base's


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
# Those whose A and B start from the weights train both, in every layer, from where they start.
WEIGHT_INIT_OPTIONS: dict[str, Any] = {
    key: value for key, value in LORA_OPTIONS.items() if key not in ("freeze_a", "trainable_tokens")
}
VIRTUAL_TOKEN_OPTIONS: dict[str, Any] = {"virtual_tokens": 20}
STARTS_FROM_FULL_WEIGHTS = "it starts from whole weights; loftq is its like for a 4-bit base"
FULL_WEIGHTS_ONLY = "PEFT computes it on whole weights only"

METHOD_FACTS: dict[MethodName, MethodFacts] = {
    "lora": MethodFacts("W + alpha/rank·BA (arXiv:2106.09685)", LORA_OPTIONS),
    "rslora": MethodFacts(
        "alpha/sqrt(rank) in place of alpha/rank: larger ranks keep learning (arXiv:2312.03732)", LORA_OPTIONS
    ),
    "dora": MethodFacts("magnitude and direction learnt apart (arXiv:2402.09353)", LORA_OPTIONS, bits=(4,)),
    "lora+": MethodFacts("B learns lr_ratio times as fast as A (arXiv:2402.12354)", {**LORA_OPTIONS, "lr_ratio": 16.0}),
    "scaled": MethodFacts(
        "W + diag(s)·BA with a trained factor s for each output row; saved folded into B", LORA_OPTIONS
    ),
    "pissa": MethodFacts(
        "A and B start as the principal components of W (arXiv:2404.02948)",
        WEIGHT_INIT_OPTIONS,
        bits=(),
        no_quantization=STARTS_FROM_FULL_WEIGHTS,
    ),
    "olora": MethodFacts(
        "A and B start as a QR decomposition of W (arXiv:2406.01775)",
        WEIGHT_INIT_OPTIONS,
        bits=(),
        no_quantization=STARTS_FROM_FULL_WEIGHTS,
    ),
    "corda": MethodFacts(
        "A and B start as the components of W that matter to the training rows (arXiv:2406.05223)",
        WEIGHT_INIT_OPTIONS,
        bits=(),
        no_quantization=STARTS_FROM_FULL_WEIGHTS,
    ),
    "eva": MethodFacts(
        "A starts as the directions in which the training rows' activations vary most (arXiv:2410.07170)",
        {key: value for key, value in WEIGHT_INIT_OPTIONS.items() if key not in ("rank_pattern", "alpha_pattern")},
    ),
    "loftq": MethodFacts(
        "A and B start as the best low-rank correction of the quantisation error (arXiv:2310.08659)",
        WEIGHT_INIT_OPTIONS,
        bits=(4,),
        needs_bits=4,
    ),
    "adalora": MethodFacts(
        "starts at rank, and drops the least important components until final_rank is the mean (arXiv:2303.10512)",
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
        "shared random A and B, and two trained vectors a layer (arXiv:2310.11454)",
        {"rank": 256, "dropout": 0.0, **TARGET_OPTIONS, "bias": "none", **FULLY_TRAINED_OPTIONS},
    ),
    "loha": MethodFacts(
        "Hadamard product of two low-rank products (arXiv:2108.06098)",
        {"rank": 16, "alpha": 32.0, "dropout": 0.0, **TARGET_OPTIONS, **FULLY_TRAINED_OPTIONS},
        bits=(),
        no_quantization=FULL_WEIGHTS_ONLY,
    ),
    "lokr": MethodFacts(
        "Kronecker product of a small and a low-rank matrix (arXiv:2309.14859)",
        {"rank": 16, "alpha": 32.0, "dropout": 0.0, **TARGET_OPTIONS, **FULLY_TRAINED_OPTIONS},
        bits=(),
        no_quantization=FULL_WEIGHTS_ONLY,
    ),
    "ia3": MethodFacts(
        "trained factors on keys, values and the inputs of the MLP's last layer (arXiv:2205.05638)",
        {"target_modules": None, "exclude_modules": None, "feedforward_modules": None, **FULLY_TRAINED_OPTIONS},
    ),
    "oft": MethodFacts(
        "W turned by a block-diagonal rotation (arXiv:2306.07280, arXiv:2506.19847)",
        {"rotation_size": 32, "dropout": 0.0, **TARGET_OPTIONS, "bias": "none", **FULLY_TRAINED_OPTIONS},
    ),
    "boft": MethodFacts(
        "W turned by a product of sparse rotations (arXiv:2311.06243)",
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
        "trained keys and values before the first token (arXiv:2101.00190)",
        VIRTUAL_TOKEN_OPTIONS,
        packs=False,
        merges=False,
    ),
    "prompt": MethodFacts(
        "trained embeddings before the first token (arXiv:2104.08691)",
        {**VIRTUAL_TOKEN_OPTIONS, "init_text": None},
        packs=False,
        merges=False,
    ),
    "p-tuning": MethodFacts(
        "trained embeddings before the first token, made by a small network (arXiv:2103.10385)",
        {**VIRTUAL_TOKEN_OPTIONS, "hidden_size": 128},
        packs=False,
        merges=False,
    ),
}
