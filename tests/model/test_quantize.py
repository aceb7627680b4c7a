"""NF4 on the CPU: the base is four bits and stays as it is, and the adapter learns over it."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.evaluation.likelihood import measure_likelihood
from lora_cli.model import (
    adalora,
    base_model,
    fp32_weights,
    fused_lora,
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
from lora_cli.training.optimizer import make_optimizer
from tests.model import zoo


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ({"type": "fp4", "double_quant": False}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
        ({"compute_dtype": "float32"}, {"bnb_4bit_compute_dtype": torch.float32}),
        ({"bits": 8}, {"load_in_8bit": True, "load_in_4bit": False}),
    ],
)
def test_the_section_is_what_bitsandbytes_is_told(section: dict[str, object], expected: dict[str, object]):
    config = quantize.bnb_config(QuantizationSpec.model_validate(section))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.fixture(params=[True, False], ids=["double", "single"])
def nf4(request: pytest.FixtureRequest, tiny_folder: Path) -> Any:
    """The tiny llama in NF4, as training loads it."""
    spec = QuantizationSpec.model_validate({"compute_dtype": "float32", "double_quant": request.param})
    return load(tiny_folder, spec)


def load(folder: Path, spec: QuantizationSpec | None = None, *, dtype: torch.dtype = torch.float32) -> Any:
    source, cpu = base_model.ModelSource(str(folder), {}), torch.device("cpu")
    return base_model.load_base(source, dtype=dtype, device=cpu, attention="sdpa", quantization=spec).model


def dequantised(nf4: Any, folder: Path) -> Any:
    """The same model with its 4-bit weights written out in fp32."""
    plain = load(folder)
    for name, layer in nf4.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            held = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            plain.get_submodule(name).weight.data = held
    return plain


def test_weights_are_four_bits_and_near(nf4: Any, tiny_folder: Path):
    layers = {name: layer for name, layer in nf4.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    whole, back = load(tiny_folder), dequantised(nf4, tiny_folder)
    for name, layer in layers.items():
        exact, held = whole.get_submodule(name).weight, back.get_submodule(name).weight
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == exact.numel() // 2
        assert 0 < float((held - exact).norm() / exact.norm()) < 0.12  # of normal numbers: about 9 %


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_codes_and_scales_are_bitsandbytes_own(tiny_folder: Path, code: str, double: bool):
    spec = QuantizationSpec.model_validate({"type": code, "double_quant": double})
    held, whole = load(tiny_folder, spec, dtype=torch.bfloat16), load(tiny_folder, dtype=torch.bfloat16)
    count = 0
    for name, layer in held.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        count += 1
        codes, state = bnb.functional.quantize_4bit(
            whole.get_submodule(name).weight, quant_type=code, compress_statistics=double
        )
        mine = layer.weight.quant_state
        assert torch.equal(layer.weight.data, codes)
        assert torch.equal(mine.absmax, state.absmax)
        assert (mine.quant_type, mine.nested, mine.blocksize) == (code, double, quantize.BLOCK_SIZE)
        if double:
            assert torch.equal(mine.state2.absmax, state.state2.absmax)
            assert torch.equal(mine.offset, state.offset)
    assert count == 14


def test_double_quantised_weights_of_the_demo_model_take_little_more_than_half_a_byte(demo_folder: Path):
    model = load(demo_folder, QuantizationSpec(), dtype=torch.bfloat16)
    taken, held = quantize.quantized_bytes(model)
    layers = target_modules.linear_layers(load(demo_folder, None, dtype=torch.bfloat16))
    assert held == sum(layer.weight.numel() for layer in layers.values())
    assert 0.5 < taken / held <= 0.6
    # QLoRA, section 3: 0.127 bits a weight for the scales.
    assert taken / held == pytest.approx(0.5 + 0.127 / 8, rel=2e-2)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_how_codes_are_stored_changes_no_number(tiny_folder: Path, storage: str):
    spec = QuantizationSpec.model_validate({"compute_dtype": "float32", "storage_dtype": storage})
    model = load(tiny_folder, spec)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == getattr(torch, storage)
    ids = torch.arange(3, 40)[None]
    plain = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "float32"}))
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_norms_are_fp32_and_all_else_is_in_the_compute_dtype(tiny_folder: Path):
    model = load(tiny_folder, QuantizationSpec(), dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {torch.bfloat16}
    seen: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
        layer.register_forward_hook(lambda _, given, out: seen.append(out.dtype))
    assert model(torch.arange(3, 9)[None]).logits.dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}


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
    again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


SETTING = AdapterContext(
    encode=lambda text: [3], plan=BatchPlan(zoo.rows_of([30, 41]), packing=True, size=60, batches_per_step=1, seed=0)
)
OVER = [(bits, name) for name, facts in METHOD_FACTS.items() for bits in facts.bits]


@pytest.mark.parametrize(("bits", "method"), OVER)
def test_every_method_that_says_so_learns_over_a_quantised_base(
    bits: int, method: str, tiny_folder: Path, tmp_path: Path
):
    """A few steps lower the loss, the base stays, and plain PEFT loads what is saved."""
    section = {"bits": bits, "compute_dtype": "float32"} if bits == 4 else {"bits": 8}
    spec = QuantizationSpec.model_validate(section)
    model = load(tiny_folder, spec)
    context = SETTING._replace(total_steps=8, originals=lambda: load(tiny_folder).state_dict())
    adapted = zoo.attached(model, method=method, context=context)
    fused_lora.fuse(adapted)
    fp32_weights.upcast_trainable_params(adapted)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    training = TrainingSpec.model_validate({"learning_rate": 0.02, "schedule": "constant", "warmup": 0})
    plan = BatchPlan(zoo.rows_of([12, 30, 7, 21]), packing=False, size=4, batches_per_step=1, seed=0)
    around = {"spec": training, "optimizer": make_optimizer(adapted, training), "accelerator": Accelerator(cpu=True)}
    steps = list(fit(adapted, plan, total=8, rank_allocator=adalora.rank_allocator(adapted), **around))
    assert steps[-1].loss < steps[0].loss
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters() if not p.requires_grad)
    (batch,) = plan.whole()
    if rank_allocator := adalora.rank_allocator(adapted):
        rank_allocator.prune()
    save_adapter.save_adapter(adapted, tmp_path, base="x", revision=None)

    def logits(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return LossFunction(one.eval()).logits(batch).double()

    found = save_adapter.difference_when_loaded(adapted, tmp_path, logits, fp32_weights.upcast_trainable_params)
    assert found.is_none(torch.float32), found


def test_loftq_starts_nearer_to_the_whole_model(tiny_folder: Path):
    whole = load(tiny_folder)
    nf4 = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "float32"}))
    ids = torch.arange(3, 40)[None]
    expected = whole(ids).logits
    bare = zoo.relative(nf4(ids).logits, expected)
    context = SETTING._replace(originals=whole.state_dict)
    layer = "model.layers.0.mlp.up_proj"
    off = nf4.get_submodule(layer).weight
    error = whole.get_submodule(layer).weight - bnb.functional.dequantize_4bit(off.data, off.quant_state)
    model = zoo.attached(nf4, method="loftq", rank=32, context=context)
    assert zoo.relative(model(input_ids=ids).logits, expected) < 0.8 * bare
    lora = model.get_base_model().get_submodule(layer)
    update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    # The best fit of its rank (Eckart and Young): what is left are the singular values behind it.
    rest = torch.linalg.svdvals(error)[32:]
    assert float((error - update).norm()) == pytest.approx(float(rest.norm()), rel=1e-4)


def test_rows_that_are_no_whole_blocks_are_refused_on_the_cpu(tmp_path: Path):
    """bitsandbytes' kernel dequantises them with an error of 25 % in place of 9 %, and says nothing."""
    zoo.make("llama", intermediate_size=96).save_pretrained(tmp_path)
    with pytest.raises(LoraError, match=r"multiple of 64 only; not so: down_proj \(96\)$"):
        load(tmp_path, QuantizationSpec.model_validate({}))


def test_gradients_are_those_over_the_dequantised_weights_even_after_evaluating(nf4: Any, tiny_folder: Path):
    rows = zoo.rows_of([12, 30, 7, 21])
    reference = zoo.adapted(dequantised(nf4, tiny_folder))
    total, _ = zoo.loss_row_by_row(reference, rows)
    expected = torch.autograd.grad(total, [p for p in reference.parameters() if p.requires_grad])

    proof = select_attention.choose_attention(nf4, "auto", packing=True)  # runs the model in eval mode
    assert proof is not None
    assert proof.leak == 0
    model = zoo.adapted(nf4)
    assert fused_lora.fuse(model) == 14
    plan = BatchPlan(rows, packing=True, size=70, batches_per_step=1, seed=0)
    loss_fn = LossFunction(model)
    found = measure_likelihood(loss_fn, plan)
    model.train()
    (batch,) = plan.whole()
    loss = loss_fn(batch).loss
    got = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert found.loss * found.tokens == pytest.approx(total.item(), rel=1e-5)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for mine, theirs in zip(got, expected, strict=True):
        assert zoo.relative(mine, theirs) < 1e-4


def test_training_moves_the_adapter_alone(nf4: Any):
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


def test_packing_is_judged_by_the_dtype_of_the_products(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is not quantised may be fp32, but the products are made in bf16 and are as exact as that."""
    model = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "bfloat16"}))
    assert model.dtype == torch.float32
    assert select_attention.matmul_dtype(model) == torch.bfloat16
    asked = []
    right = select_attention.candidates
    monkeypatch.setattr(select_attention, "candidates", lambda *x, **kw: asked.append(kw["dtype"]) or right(*x, **kw))
    proof = select_attention.choose_attention(model, "sdpa", packing=True)  # as on a GPU
    assert asked == [torch.bfloat16]  # flash attention would be tried
    assert proof is not None
    assert proof.leak == 0
    assert proof.difference > select_attention.TOLERANCE[torch.float32]


def test_int8_is_refused_for_its_outliers_not_for_the_model(tiny_folder: Path):
    model = load(tiny_folder, QuantizationSpec(bits=8))
    assert select_attention.matmul_dtype(model) == torch.float16
    with pytest.raises(LoraError, match=r"data\.packing: 8-bit layers .* outlier columns") as caught:
        select_attention.choose_attention(model, "auto", packing=True)
    assert "quantization.bits: 8" in str(caught.value.hint)
    assert "data.packing: false" in str(caught.value.hint)
