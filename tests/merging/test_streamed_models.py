"""The streamed model of an adapter on a quantized base computes what the loaded model computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.merging import compare_models, streamed_models, verify
from lora_cli.model import attach_adapter, save_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.saved_adapter import SavedAdapter
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import QuantizationSpec
from tests.merging.test_stream import randomize
from tests.model import families, zoo
from tests.model.families import FAMILIES
from tests.support import checkpoints

FP32, BF16 = torch.float32, torch.bfloat16
NF4, NF4_BF16, INT8 = {"bits": 4, "compute_dtype": "float32"}, {"bits": 4, "compute_dtype": "bfloat16"}, {"bits": 8}
# 8-bit codes of activations differ where their last digits do; bf16 rounds after other sums.
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], dict[str, Any], float]] = {
    "4 bits": ("llama", FP32, NF4, {}, 1e-6),
    "4 bits in bf16": ("llama", BF16, NF4_BF16, {}, 0.05),
    "4 bits, computed in bf16": ("llama", FP32, NF4_BF16, {}, 0.05),
    "8 bits": ("llama", FP32, INT8, {}, 0.03),
    "8 bits in bf16": ("llama", BF16, INT8, {}, 0.05),
    "DoRA": ("llama", FP32, NF4, {"method": "dora"}, 1e-6),
    "a trained head": ("llama", BF16, NF4_BF16, {"modules_to_save": ["lm_head"]}, 0.05),
    "transposed weights": ("gpt2", FP32, NF4, {}, 1e-6),
    "experts": ("mixtral", FP32, NF4, {}, 1e-6),
    "stacked experts": ("llama4", FP32, NF4, {}, 1e-6),
    "a classifier": ("llama-classifier", BF16, NF4_BF16, {}, 0.05),
    "an encoder and a decoder": ("t5", FP32, NF4, {}, 1e-6),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_on_a_streamed_quantized_base_computes_as_on_the_loaded_one(case: str, tmp_path: Path):
    name, dtype, section, options, tolerance = CASES[case]
    family, spec = FAMILIES[name], QuantizationSpec.model_validate(section)
    folder, task = families.write(family, tmp_path / "base"), family.task
    labels = families.LABELS if TASKS[task].is_classification else None
    base = checkpoints.checkpoint(folder, task=task, labels=labels, pad_id=0, dtype=dtype)
    loaded = base.load(checkpoints.CPU, dtype=torch.float32)
    context = AdapterContext(task=task, heads=loaded.heads)
    adapted = attach_adapter.attach(loaded.model, zoo.spec_of(**{**family.adapter, **options}), seed=0, context=context)
    randomize(adapted)
    save_adapter.save_adapter(adapted, tmp_path / "adapter", base="x", revision=None)
    quantized = load_adapter(
        base.load(checkpoints.CPU, quantization=spec).model, open_adapter(tmp_path / "adapter"), base="base"
    )
    upcast_trainable_params(quantized)
    batch = compare_models.random_probes(
        task, tokens=60, vocabulary=80, pad_id=0, start_id=0, end_id=2 if task == "seq-cls" else None
    )
    expected = compare_models.probe_logits(quantized.eval(), batch, task)
    saved = SavedAdapter(open_adapter(tmp_path / "adapter"), base)
    with verify.open_streams() as streams:
        trained = streamed_models.open_trained(saved, spec, streams).model
        assert zoo.relative(compare_models.probe_logits(trained, batch, task), expected) < tolerance
        original = streamed_models.open_adapted(saved, {}, streams).model
        assert zoo.relative(compare_models.probe_logits(original, batch, task), expected) > 1.2 * tolerance
