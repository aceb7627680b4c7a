"""QLoRA on the CPU: the base is quantized (NF4, FP4, int8) and stays unchanged, and the adapter on it learns."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.evaluation.likelihood import measure_likelihood
from lora_cli.model import (
    adalora,
    fake_quantize,
    fp32_weights,
    quantize,
    save_adapter,
    select_attention,
    target_modules,
)
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.loss import LossFunction
from lora_cli.recipe.methods import METHOD_FACTS
from lora_cli.recipe.schema import QuantizationSpec, TrainingSpec
from lora_cli.training.loop import fit
from lora_cli.training.memory_ladder import MemoryLadder, Rung, drop_gradients
from lora_cli.training.optimizer import make_optimizer
from tests.model import zoo
from tests.model.families import FAMILIES, config_of
from tests.support import checkpoints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ({"type": "fp4", "double_quant": False}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        ({"compute_dtype": "float32"}, {"bnb_4bit_compute_dtype": torch.float32}),
        ({"bits": 8}, {"load_in_8bit": True, "load_in_4bit": False}),
    ],
)
def test_the_section_becomes_a_bitsandbytes_config(section: dict[str, object], expected: dict[str, object]):
    config = quantize.bnb_config(QuantizationSpec.model_validate(section), torch.bfloat16)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.fixture(params=[True, False], ids=["double", "single"])
def nf4(request: pytest.FixtureRequest, tiny_folder: Path) -> Any:
    """Load the tiny llama in NF4, as training does."""
    spec = QuantizationSpec.model_validate({"compute_dtype": "float32", "double_quant": request.param})
    return load(tiny_folder, spec)


def load(folder: Path, spec: QuantizationSpec | None = None, *, dtype: torch.dtype = torch.float32) -> Any:
    return checkpoints.load(folder, dtype=dtype, attention="sdpa", quantization=spec)


def dequantized(nf4: Any, folder: Path) -> Any:
    """Return the same model with its 4-bit weights dequantized to fp32."""
    plain = load(folder)
    for name, layer in nf4.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            plain.get_submodule(name).weight.data = weight
    return plain


def test_weights_have_4_bits_and_are_close_to_the_originals(nf4: Any, tiny_folder: Path):
    layers = {name: layer for name, layer in nf4.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    original, restored = load(tiny_folder), dequantized(nf4, tiny_folder)
    for name, layer in layers.items():
        exact, rounded = original.get_submodule(name).weight, restored.get_submodule(name).weight
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == exact.numel() // 2
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.12  # about 9 % for normally distributed values


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(tiny_folder: Path, code: str, double: bool):
    spec = QuantizationSpec.model_validate({"type": code, "double_quant": double})
    quantized, original = load(tiny_folder, spec, dtype=torch.bfloat16), load(tiny_folder, dtype=torch.bfloat16)
    count = 0
    for name, layer in quantized.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        count += 1
        codes, state = bnb.functional.quantize_4bit(
            original.get_submodule(name).weight, quant_type=code, compress_statistics=double
        )
        actual = layer.weight.quant_state
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(actual.absmax, state.absmax)
        assert (actual.quant_type, actual.nested, actual.blocksize) == (code, double, quantize.BLOCK_SIZE)
        if double:
            assert torch.equal(actual.state2.absmax, state.state2.absmax)
            assert torch.equal(actual.offset, state.offset)
    assert count == 14


def test_double_quantized_weights_of_the_demo_model_take_little_more_than_half_a_byte(demo_folder: Path):
    model = load(demo_folder, QuantizationSpec(), dtype=torch.bfloat16)
    size, weights = quantize.quantized_bytes(model)
    layers = target_modules.linear_layers(load(demo_folder, None, dtype=torch.bfloat16))
    assert weights == sum(layer.weight.numel() for layer in layers.values())
    assert 0.5 < size / weights <= 0.6
    # QLoRA, section 3: 0.127 bits per weight for the scales.
    assert size / weights == pytest.approx(0.5 + 0.127 / 8, rel=2e-2)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_the_storage_dtype_of_codes_does_not_change_results(tiny_folder: Path, storage: str):
    spec = QuantizationSpec.model_validate({"compute_dtype": "float32", "storage_dtype": storage})
    model = load(tiny_folder, spec)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == getattr(torch, storage)
    ids = torch.arange(3, 40)[None]
    plain = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "float32"}))
    assert torch.equal(model(ids).logits, plain(ids).logits)


class Bf16Norm(nn.Module):
    """A norm that computes in the dtype of its input; its name ends as those of transformers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight * x * (x * x).mean(-1, keepdim=True).rsqrt()


class CoarseRMSNorm(Bf16Norm):
    pass


class GatedRMSNorm(Bf16Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        assert gate is None or gate.dtype == x.dtype
        return super().forward(x) * gate.sigmoid()  # type: ignore[union-attr]


def test_norms_compute_in_fp32_without_a_hook_where_they_do_so_anyway(tiny_folder: Path):
    model = load(tiny_folder, QuantizationSpec(), dtype=torch.bfloat16)
    norms = [module for module in model.modules() if type(module).__name__ == "LlamaRMSNorm"]
    assert norms
    assert not any(norm._forward_hooks or norm._forward_pre_hooks for norm in norms)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad}
    assert dtypes == {torch.bfloat16}
    x = (torch.randn(1, 5, norms[0].weight.shape[0]) * 30).bfloat16()
    exact = nn.functional.rms_norm(x.double(), x.shape[-1:], norms[0].weight.double(), norms[0].variance_epsilon)
    assert ((norms[0](x) - exact).abs() <= exact.abs() * 2**-7).all()  # two roundings to 8 bits


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_norms_of_torch_need_no_hook(kind: Any):
    model = nn.Sequential(kind(8).bfloat16())
    quantize.prepare_for_kbit_training(model, torch.bfloat16)  # type: ignore[arg-type]
    assert model[0].weight.dtype == torch.bfloat16
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("kind", [CoarseRMSNorm, GatedRMSNorm])
def test_norms_that_compute_in_their_dtype_get_fp32(kind: type[Bf16Norm]):
    model = nn.Sequential(kind(8))
    quantize.prepare_for_kbit_training(model, torch.bfloat16)  # type: ignore[arg-type]
    seen: list[torch.dtype] = []
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = torch.randn(3, 8).bfloat16()
    output = model[0](x, torch.zeros(3, 8)) if kind is GatedRMSNorm else model[0](x)
    assert (model[0].weight.dtype, seen, output.dtype) == (torch.float32, [torch.float32], torch.bfloat16)


def test_checkpointed_gradients_are_the_same(nf4: Any):
    model = zoo.adapted(nf4, dropout=0.2)
    ids = torch.arange(3, 40)[None]
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return torch.autograd.grad(model.train()(input_ids=ids, labels=ids).loss, trained)

    expected = gradients()
    nf4.activation_checkpointing_enable({"use_reentrant": False})
    nf4.enable_input_require_grads()
    checkpointed = gradients()
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, expected, strict=True))


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_an_8_bit_base_changes_no_gradient(every: int, tiny_folder: Path):
    """With the form of checkpointing that is not reentrant, int8 layers would keep their inputs in memory."""
    model = zoo.adapted(load(tiny_folder, QuantizationSpec(bits=8)), dropout=0.2)
    ids = torch.arange(3, 40)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    plan = BatchPlan(zoo.rows_of([30]), packing=False, size=1, batches_per_step=1, seed=0)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad for p in trained]
        drop_gradients(trained)
        return found

    expected = gradients()
    MemoryLadder(
        model.get_base_model(), setting="auto", can_recompute=True, use_reentrant=True, max_parts=plan.max_rows,
        reserve=0, info=print,
    ).set(Rung(every))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


CONTEXT = AdapterContext(
    encode=lambda text: [3], plan=BatchPlan(zoo.rows_of([30, 41]), packing=True, size=60, batches_per_step=1, seed=0)
)
SUPPORTED = [(bits, name) for name, facts in METHOD_FACTS.items() for bits in facts.bits]


@pytest.mark.parametrize(("bits", "method"), SUPPORTED)
def test_every_method_that_supports_a_quantized_base_learns_on_it(
    bits: int, method: str, tiny_folder: Path, tmp_path: Path
):
    """A few steps lower the loss, the base does not change, and plain PEFT loads the saved adapter."""
    section = {"bits": bits, "compute_dtype": "float32"} if bits == 4 else {"bits": 8}
    spec = QuantizationSpec.model_validate(section)
    model = load(tiny_folder, spec)
    context = CONTEXT._replace(total_steps=8, unquantized_weights=lambda: load(tiny_folder).state_dict())
    adapted = zoo.attached(model, method=method, context=context)
    fp32_weights.upcast_trainable_params(adapted)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    training = TrainingSpec.model_validate({"learning_rate": 0.02, "schedule": "constant", "warmup": 0})
    plan = BatchPlan(zoo.rows_of([12, 30, 7, 21]), packing=False, size=4, batches_per_step=1, seed=0)
    options = {"spec": training, "optimizer": make_optimizer(adapted, training), "accelerator": Accelerator(cpu=True)}
    steps = list(fit(adapted, plan, total=8, rank_allocator=adalora.rank_allocator(adapted), **options))
    assert steps[-1].loss < steps[0].loss
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters() if not p.requires_grad)
    (batch,) = plan.all_batches()
    if rank_allocator := adalora.rank_allocator(adapted):
        rank_allocator.prune()
    save_adapter.save_adapter(adapted, tmp_path, base="x", revision=None)

    def logits(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return LossFunction(one.eval()).logits(batch).double()

    difference = save_adapter.compare_reloaded(adapted, tmp_path, logits)
    difference.check(torch.float32)


def test_loftq_starts_closer_to_the_unquantized_model(tiny_folder: Path):
    original = load(tiny_folder)
    nf4 = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "float32"}))
    ids = torch.arange(3, 40)[None]
    expected = original(ids).logits
    without_adapter = zoo.relative(nf4(ids).logits, expected)
    context = CONTEXT._replace(unquantized_weights=original.state_dict)
    layer = "model.layers.0.mlp.up_proj"
    quantized = nf4.get_submodule(layer).weight
    rounded = bnb.functional.dequantize_4bit(quantized.data, quantized.quant_state)
    error = original.get_submodule(layer).weight - rounded
    model = zoo.attached(nf4, method="loftq", rank=32, context=context)
    assert zoo.relative(model(input_ids=ids).logits, expected) < 0.8 * without_adapter
    lora = model.get_base_model().get_submodule(layer)
    update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    # The best approximation of this rank leaves the remaining singular values (Eckart and Young).
    rest = torch.linalg.svdvals(error)[32:]
    assert float((error - update).norm()) == pytest.approx(float(rest.norm()), rel=1e-4)


def test_in_features_that_are_not_a_multiple_of_the_block_size_raise_on_the_cpu(tmp_path: Path):
    """bitsandbytes' kernel dequantizes them with an error of 25 % in place of 9 %, without a warning."""
    zoo.make("llama", intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(LoraError, match=r"must be a multiple of 64; found down_proj \(96\)$"):
        load(tmp_path, QuantizationSpec.model_validate({}))


def test_gradients_equal_those_on_dequantized_weights_even_after_evaluation(nf4: Any, tiny_folder: Path):
    rows = zoo.rows_of([12, 30, 7, 21])
    reference = zoo.adapted(dequantized(nf4, tiny_folder))
    total, _ = zoo.loss_row_by_row(reference, rows)
    expected = torch.autograd.grad(total, [p for p in reference.parameters() if p.requires_grad])

    check = select_attention.choose_attention(nf4, "auto", packing=True)  # runs the model in eval mode
    assert check is not None
    assert check.leak == 0
    model = zoo.adapted(nf4)
    assert len(zoo.fused_layers(model)) == 14
    plan = BatchPlan(rows, packing=True, size=70, batches_per_step=1, seed=0)
    loss_fn = LossFunction(model)
    likelihood = measure_likelihood(loss_fn, plan)
    model.train()
    (batch,) = plan.all_batches()
    loss = loss_fn(batch).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert likelihood.loss * likelihood.tokens == pytest.approx(total.item(), rel=1e-5)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert zoo.relative(gradient, reference) < 1e-4


def test_training_changes_only_the_adapter(nf4: Any):
    select_attention.choose_attention(nf4, "auto", packing=True)
    model = zoo.adapted(nf4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = TrainingSpec.model_validate({"learning_rate": 0.01, "schedule": "constant", "warmup": 0})
    optimizer, accelerator = make_optimizer(model, training), Accelerator(cpu=True)
    plan = BatchPlan(zoo.rows_of([12, 30, 7, 21]), packing=True, size=40, batches_per_step=2, seed=0)
    steps = list(fit(model, plan, spec=training, optimizer=optimizer, accelerator=accelerator, total=8))
    assert steps[-1].loss < 0.9 * steps[0].loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_the_packing_check_uses_the_matmul_dtype(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Unquantized parameters may be fp32, but quantized layers multiply in bf16, with the rounding of bf16."""
    model = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "bfloat16"}))
    assert model.dtype == torch.float32
    assert select_attention.matmul_dtype(model) == torch.bfloat16
    dtypes = []
    original = select_attention.candidates
    monkeypatch.setattr(
        select_attention, "candidates", lambda *x, **kw: dtypes.append(kw["dtype"]) or original(*x, **kw)
    )
    check = select_attention.choose_attention(model, "sdpa", packing=True)  # as on a GPU
    assert dtypes == [torch.bfloat16]  # so that flash attention would be tried on a GPU
    assert check is not None
    assert check.leak == 0
    assert check.difference > select_attention.TOLERANCE[torch.float32]


def test_packing_with_int8_raises_because_of_outlier_columns_not_because_of_the_model(tiny_folder: Path):
    model = load(tiny_folder, QuantizationSpec(bits=8))
    assert select_attention.matmul_dtype(model) == torch.float16
    with pytest.raises(LoraError, match=r"data\.packing: 8-bit layers .* outlier columns") as caught:
        select_attention.choose_attention(model, "auto", packing=True)
    assert "quantization.bits: 8" in str(caught.value.hint)
    assert "data.packing: false" in str(caught.value.hint)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.task == "causal-lm"])
def test_every_linear_layer_of_a_language_model_is_quantized(name: str, bits: int):
    """transformers passes over layers of another class, and Falcon's would stay in 16 bits without a word."""
    config = config_of(FAMILIES[name])
    with torch.device("meta"):
        model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    layers = {f"{layer}.weight" for layer in target_modules.linear_layers(model)}
    spec = QuantizationSpec.model_validate({"bits": bits})
    assert layers <= fake_quantize.quantized_weights(other, spec).keys()
