"""Measure one way to train the demo model on real rows: a process of its own. Called by run_bench.py.

python -m tests.bench.measure_bench BASE DTYPE WAY STEPS MODEL DATA TOKENS     prints one line of JSON

The way `limit` takes no step: it measures the matrix products that a step cannot do without.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_cli.data.encoded_rows import EncodedRows
from lora_cli.model.gguf_base import unpack_gguf
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.run.cache_folder import cache_folder
from lora_cli.setup.inputs import load_inputs
from lora_cli.training.cpu import set_up_cpu
from tests.gpu.cases import Base, Shape
from tests.gpu.measure import Work, packed_plan, print_result

CPU = torch.device("cpu")
ROUNDS = 5  # of the limit's products; the best counts


@dataclass(frozen=True)
class RealWork(Work):
    """The demo model on the rows of a file, encoded by lora for all."""

    folder: Path  # of the model, unquantized
    encoded: EncodedRows

    def rows(self) -> Any:
        """Return the rows."""
        return self.encoded

    def model(self) -> PreTrainedModel:
        """Return a new base, as transformers loads it."""
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )
        options: dict[str, Any] = {"quantization_config": nf4} if self.base == "nf4" else {}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, **options)
        return model.requires_grad_(False)


def make_work(base: Base, dtype: str, steps: int, *, model: Path, data: Path, tokens: int) -> RealWork:
    """Return the work, with the rows of `data` encoded (or read from the cache), at most `tokens` long."""
    folder = unpack_gguf(model, dtype=torch.float32, cache=cache_folder(), info=console.no_output)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(model), "dtype": dtype},
            "data": {"train": str(data), "eval": None, "max_length": tokens, "overlong": "drop", "max_loss": 0.5},
        }
    )
    rows = load_inputs(recipe, info=console.no_output, weights=False).data.train
    config = AutoConfig.from_pretrained(folder)
    values = {name: value for name, value in config.to_diff_dict().items() if name != "model_type"}
    shape = Shape(config.model_type, values, (base,), tokens, median=int(rows.lengths.mean()))
    return RealWork(shape, base, steps, CPU, getattr(torch, dtype), folder, rows)


def measure_limit(work: RealWork) -> dict[str, Any]:
    """Time the products of one packed batch alone: of all layers forward and backward, and of the head at its labels.

    A frozen layer multiplies twice: x·Wᵀ, and its gradient with W. Without them, no way can train; the rest of a step
    (attention, norms, the adapter, the optimizer) is what a faster program could save.
    """
    plan = packed_plan(work)
    batches = [batch for number in range(work.steps) for _, batch in plan.batches_of_step(number)]
    tokens = sum(batch.tokens for batch in batches) / len(batches)
    supervised = sum(len(batch.targets) for batch in batches) / len(batches)
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=work.dtype)
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    best = float("inf")
    operations = sum(4 * layer.weight.numel() * (supervised if layer is head else tokens) for layer in layers)
    inputs: dict[tuple[int, int], torch.Tensor] = {}

    def of(rows: float, width: int) -> torch.Tensor:
        key = (round(rows), width)
        if key not in inputs:
            inputs[key] = torch.randn(*key).to(work.dtype)
        return inputs[key]

    with torch.no_grad():
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for layer in layers:
                rows = supervised if layer is head else tokens
                of(rows, layer.in_features) @ layer.weight.T
                of(rows, layer.out_features) @ layer.weight
            best = min(best, time.perf_counter() - start)
    return {"tokens_per_second": tokens / best, "operations_per_second": operations / best, "tokens": tokens}


def main(arguments: list[str]) -> int:
    """Measure as the command line says."""
    base, dtype, way, steps, model, data, tokens = arguments
    set_up_cpu()
    work = make_work(cast(Base, base), dtype, int(steps), model=Path(model), data=Path(data), tokens=int(tokens))
    if way == "limit":
        sys.stdout.write(json.dumps(measure_limit(work)) + "\n")
        return 0
    return print_result(work, way)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
