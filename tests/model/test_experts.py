"""QLoRA of mixtures of experts: stacked weights packed in 4 bits, adapters on them, and what the user is told."""

import gc
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model import (
    attach_adapter,
    expert_targets,
    experts,
    fp32_weights,
    quantization_report,
    quantize,
    save_adapter,
)
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.fake_quantize import quantize_dequantize, quantized_weights
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.loss import LossFunction
from lora_cli.model.weight_memory import quantized_sizes
from lora_cli.recipe.schema import QuantizationSpec
from tests.model import families, zoo
from tests.model.families import FAMILIES
from tests.support import checkpoints

# Their experts differ: stacked from single tensors, with biases and transposed, run on all tokens, with shared experts.
KINDS = ["mixtral", "qwen3-moe", "gpt-oss", "llama4", "jetmoe", "qwen2-moe"]
IDS = torch.arange(3, 40)[None]
FP32 = QuantizationSpec.model_validate({"compute_dtype": "float32"})


def load(folder: Path, spec: QuantizationSpec | None = FP32, *, dtype: torch.dtype = torch.float32) -> Any:
    return checkpoints.load(folder, dtype=dtype, quantization=spec)


def dequantized(quantized: Any, folder: Path) -> Any:
    """Return the same model with its 4-bit weights dequantized."""
    plain = load(folder, None)
    for name, layer in quantized.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            plain.get_submodule(name).weight.data = bnb.functional.dequantize_4bit(
                layer.weight, layer.weight.quant_state
            )
    for name, weight in experts.expert_weights(quantized).items():
        packed = experts.packed_weight(weight.module, weight.parameter)
        assert packed is not None
        plain.get_parameter(name).data = packed.dense()
    return plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {name: families.write(FAMILIES[name], root / name) for name in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_packed_experts_equals_training_on_their_dequantized_weights(kind: str, folders: dict[str, Path]):
    """Logits and gradients, with gradient checkpointing too; no packed weight has a parameter of its full size."""
    quantized = load(folders[kind])
    weights = experts.expert_weights(quantized)
    assert weights
    assert all(weight.packed for weight in weights.values())
    assert not weights.keys() & dict(quantized.named_parameters()).keys()
    reference = dequantized(quantized, folders[kind])
    expected = load(folders[kind], None)(IDS).logits
    assert zoo.relative(quantized(IDS).logits, reference(IDS).logits) < 1e-6
    assert zoo.relative(quantized(IDS).logits, expected) > 1e-3  # it is quantized
    models = [zoo.adapted(model) for model in (reference, quantized)]

    def gradients(model: PeftModel) -> tuple[Tensor, ...]:
        loss = model(input_ids=IDS, labels=IDS).loss
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    plain, packed = (gradients(model) for model in models)
    if not quantized.supports_gradient_checkpointing:
        assert max(zoo.relative(a, b) for a, b in zip(packed, plain, strict=True)) < 1e-5
        return
    quantized.train()
    quantized.activation_checkpointing_enable({"use_reentrant": False})
    quantized.enable_input_require_grads()
    for found in (packed, gradients(models[1])):
        assert len(found) == len(plain)
        assert max(zoo.relative(a, b) for a, b in zip(found, plain, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("section", [{}, {"type": "fp4", "double_quant": False, "storage_dtype": "bfloat16"}], ids=str)
def test_codes_and_scales_are_those_of_bitsandbytes(section: dict[str, Any], folders: dict[str, Path]):
    spec = QuantizationSpec.model_validate({**section, "compute_dtype": "float32"})
    quantized, original = (load(folders["mixtral"], each, dtype=torch.bfloat16) for each in (spec, None))
    transform = quantize_dequantize(spec, torch.bfloat16, transposed=False)
    for name, weight in experts.expert_weights(quantized).items():
        packed = experts.packed_weight(weight.module, weight.parameter)
        assert packed is not None
        value = original.get_parameter(name)
        codes, state = bnb.functional.quantize_4bit(
            value.data.flatten(), quant_type=spec.type, compress_statistics=spec.double_quant
        )
        assert packed.codes.dtype == getattr(torch, str(spec.storage_dtype))
        assert torch.equal(packed.codes.view(torch.uint8).flatten(), codes.flatten())
        assert torch.equal(packed.quant_state.absmax, state.absmax)
        assert packed.dense().dtype == packed.compute_dtype == torch.float32
        # The merge's `dequantized` weights are those that training computed with.
        assert torch.equal(transform(value.data), packed.dense().to(torch.bfloat16))
        scales = packed.scales()
        parts = torch.stack([packed.expert(number, scales) for number in range(weight.shape[0])])
        assert torch.equal(parts, packed.dense())
    size, count = quantize.quantized_bytes(quantized)
    assert count == sum(quantized_sizes(load(folders["mixtral"], None), spec).values())
    assert size / count < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss", "llama4"])
def test_an_adapter_on_packed_experts_is_saved_for_plain_peft(kind: str, folders: dict[str, Path], tmp_path: Path):
    """The names in the file do not depend on whether the experts are packed; one step lowers the loss."""
    quantized = load(folders[kind])
    reference = dequantized(quantized, folders[kind])
    model = zoo.attached(quantized)
    fp32_weights.upcast_trainable_params(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    save_adapter.save_adapter(model, tmp_path, base="x", revision=None)
    plan = BatchPlan(zoo.rows_of([30, 41]), packing=False, size=2, batches_per_step=1, seed=0)
    (batch,) = plan.all_batches()

    def logits(one: Any) -> Tensor:
        with torch.no_grad():
            return LossFunction(one.eval()).logits(batch).double()

    expected = logits(model)
    plain = PeftModel.from_pretrained(reference, str(tmp_path))  # without our layers
    assert zoo.relative(logits(plain), expected) < 1e-5
    again = load_adapter(load(folders[kind]), open_adapter(tmp_path), base="x")
    again = load_adapter(again, open_adapter(tmp_path), base="x", name="second")
    assert zoo.relative(logits(again), expected) < 1e-6
    difference = save_adapter.compare_reloaded(model, tmp_path, logits)
    difference.check(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3-moe", "llama4"])
def test_autograd_keeps_no_weight_of_experts(kind: str, folders: dict[str, Path]):
    model = zoo.attached(load(folders[kind]))
    saved: list[tuple[int, ...]] = []
    weights = {tuple(weight.shape) for weight in experts.expert_weights(model.get_base_model()).values()}

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    assert saved
    assert not weights & set(saved)
    assert not {shape[1:] for shape in weights} & set(saved)
    loss.backward()
    del loss, model
    gc.collect()


def test_all_linear_covers_the_experts_of_every_family_and_no_router(folders: dict[str, Path]):
    for kind, folder in folders.items():
        base = checkpoints.checkpoint(folder).skeleton()
        model = zoo.attached(base)
        rows = {row.kind: row for row in attach_adapter.coverage(model, {})}
        routers = [row for name, row in rows.items() if name.endswith("(router)")]
        stacked = [row for row in rows.values() if row.experts]
        assert sum(row.layers for row in routers) >= 2, kind
        assert sum(row.matched for row in routers) == 0, kind
        assert all(row.matched == row.layers and row.experts == 4 for row in stacked), kind
        assert len(stacked) == 2, kind


def adapted(folders: dict[str, Path], kind: str, **options: Any) -> set[str]:
    model = zoo.attached(checkpoints.checkpoint(folders[kind]).skeleton(), **options)
    return {".".join(name.split(".")[-2:]) for name in attach_adapter.adapted_layers(model)}


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        ("qwen3-moe", ["experts"], {"experts.gate_up_proj", "experts.down_proj"}),
        ("qwen3-moe", ["down_proj"], {"experts.down_proj"}),
        ("qwen3-moe", ["q_proj", "gate_proj", "up_proj"], {"self_attn.q_proj", "experts.gate_up_proj"}),
        ("mixtral", ["w1", "w2", "w3"], {"experts.gate_up_proj", "experts.down_proj"}),
        ("mixtral", ["v_proj", "gate"], {"self_attn.v_proj", "gate.weight"}),
        ("llama4", ["router"], {"feed_forward.router"}),
        ("qwen2-moe", ["up_proj"], {"shared_expert.up_proj"}),
        (
            "qwen2-moe",
            ["gate_proj", "up_proj"],
            {"shared_expert.up_proj", "shared_expert.gate_proj", "experts.gate_up_proj"},
        ),
        ("mixtral", r".*\.(q_proj|down_proj)", {"self_attn.q_proj", "experts.down_proj"}),
    ],
)
def test_names_of_experts_and_routers(kind: str, names: Any, expected: set[str], folders: dict[str, Path]):
    assert adapted(folders, kind, target_modules=names) == expected


def test_narrowed_targets(folders: dict[str, Path]):
    assert not any("experts" in name for name in adapted(folders, "gpt-oss", exclude_modules=["experts"]))
    model = zoo.attached(checkpoints.checkpoint(folders["mixtral"]).skeleton(), layers=[1])
    assert {name.split(".")[2] for name in attach_adapter.adapted_layers(model)} == {"1"}
    model = zoo.attached(checkpoints.checkpoint(folders["mixtral"]).skeleton(), rank_pattern={"down_proj": 2})
    ranks = {m.parameter_name: m.r["default"] for m in model.modules() if hasattr(m, "parameter_name")}
    assert ranks == {"gate_up_proj": 4, "down_proj": 2}


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"dropout": 0.2}, r"adapter\.dropout: 0\.2, but PEFT has no dropout for the stacked weights", "dropout: 0"),
        ({"target_modules": ["up_proj"]}, "up_proj and gate_proj of the experts are one weight, gate_up_proj", "both"),
        (
            {"target_modules": ["down_proj"], "method": "dora"},
            "down_proj is a weight of experts, and dora adapts",
            "lora+",
        ),
        ({"target_modules": ["experts"], "method": "dora"}, "experts is a weight of experts, and dora", "leave it out"),
        ({"target_modules": ["w1"]}, "w1 and w3 of the experts are one weight, gate_up_proj", "list both"),
    ],
    ids=str,
)
def test_mistakes(options: dict[str, Any], message: str, hint: str, folders: dict[str, Path]):
    with pytest.raises(LoraError, match=message) as caught:
        adapted(folders, "mixtral", **options)
    assert hint in str(caught.value.hint)


def test_what_is_left_out_is_told(folders: dict[str, Path]):
    base = checkpoints.checkpoint(folders["mixtral"])
    spec = zoo.spec_of(method="dora")
    lines = expert_targets.describe_experts(attach_adapter.attach(base.skeleton(), spec, seed=0), spec)
    assert lines == ["  experts have no adapter: dora adapts linear layers only"]
    spec = zoo.spec_of(dropout=0.05)  # the default
    model = attach_adapter.attach(base.skeleton(), spec, seed=0)
    assert model.peft_config["default"].lora_dropout == 0
    (line,) = expert_targets.describe_experts(model, spec)
    assert line == "  dropout: 0 in place of the default 0.05, which PEFT does not support on experts"


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (4, ["  its linear layers and experts: 4-bit nf4, double quantization, computed in bfloat16",
             "  4 bits: 94% of the weights; embed_tokens, lm_head stay bfloat16: 24 KiB"]),
        (8, ["  its linear layers: int8 (LLM.int8)",
             "  8 bits: 10% of the weights; experts, embed_tokens, lm_head stay bfloat16: 408 KiB",
             "  bitsandbytes has no int8 form of stacked expert weights; bits: 4 packs them"]),
    ],
)  # fmt: skip
def test_the_share_of_quantized_weights_is_told(bits: int, expected: list[str], folders: dict[str, Path]):
    skeleton = checkpoints.checkpoint(folders["mixtral"]).skeleton()
    spec = QuantizationSpec.model_validate({"bits": bits})
    lines = quantization_report.describe_quantization(skeleton, spec, existing=None, dtype=torch.bfloat16)
    assert lines == expected
    names = quantized_weights(checkpoints.checkpoint(folders["mixtral"]).skeleton(), spec)
    assert names.keys() == quantized_sizes(skeleton, spec).keys()
