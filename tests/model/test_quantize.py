"""NF4 on the CPU: the base is four bits and stays as it is, and the adapter learns over it."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator

from lora_cli.data.batches import Plan
from lora_cli.errors import LoraError
from lora_cli.evaluation.likelihood import measure
from lora_cli.model import base, fused, isolation, quantize
from lora_cli.model.score import Scorer
from lora_cli.recipe.schema import QuantizationSpec, TrainingSpec
from lora_cli.training.loop import fit
from lora_cli.training.optim import make_optimizer
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
    config = quantize.library_config(QuantizationSpec.model_validate(section))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.fixture(params=[True, False], ids=["double", "single"])
def nf4(request: pytest.FixtureRequest, tiny_folder: Path) -> Any:
    """The tiny llama in NF4, as training loads it."""
    spec = QuantizationSpec.model_validate({"compute_dtype": "float32", "double_quant": request.param})
    return load(tiny_folder, spec)


def load(folder: Path, spec: QuantizationSpec | None = None, *, dtype: torch.dtype = torch.float32) -> Any:
    source, cpu = base.Source(str(folder), {}), torch.device("cpu")
    return base.load_base(source, dtype=dtype, device=cpu, attention="sdpa", quantization=spec).model


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

    proof = isolation.settle(nf4, "auto", packing=True)  # runs the model in eval mode
    assert proof is not None
    assert proof.leak == 0
    model = zoo.adapted(nf4)
    assert fused.fuse(model) == 0  # bitsandbytes multiplies
    plan = Plan(rows, packing=True, size=70, per_step=1, seed=0)
    scorer = Scorer(model)
    found = measure(scorer, plan)
    model.train()
    (batch,) = plan.whole()
    loss = scorer(batch).loss
    got = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert found.loss * found.tokens == pytest.approx(total.item(), rel=1e-5)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for mine, theirs in zip(got, expected, strict=True):
        assert zoo.relative(mine, theirs) < 1e-4


def test_training_moves_the_adapter_alone(nf4: Any):
    isolation.settle(nf4, "auto", packing=True)
    model = zoo.adapted(nf4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = TrainingSpec.model_validate({"learning_rate": 0.01, "schedule": "constant", "warmup": 0})
    optimizer, accelerator = make_optimizer(model, training), Accelerator(cpu=True)
    plan = Plan(zoo.rows_of([12, 30, 7, 21]), packing=True, size=40, per_step=2, seed=0)
    steps = list(fit(model, plan, spec=training, optimizer=optimizer, accelerator=accelerator, total=8))
    assert steps[-1].loss < 0.9 * steps[0].loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_packing_is_judged_by_the_dtype_of_the_products(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is not quantised may be fp32, but the products are made in bf16 and are as exact as that."""
    model = load(tiny_folder, QuantizationSpec.model_validate({"compute_dtype": "bfloat16"}))
    assert model.dtype == torch.float32
    assert isolation.product_dtype(model) == torch.bfloat16
    asked = []
    right = isolation.candidates
    monkeypatch.setattr(isolation, "candidates", lambda *x, **kw: asked.append(kw["dtype"]) or right(*x, **kw))
    proof = isolation.settle(model, "sdpa", packing=True)  # as on a GPU
    assert asked == [torch.bfloat16]  # flash attention would be tried
    assert proof is not None
    assert proof.leak == 0
    assert proof.difference > isolation.TOLERANCE[torch.float32]


def test_int8_is_refused_for_its_outliers_not_for_the_model(tiny_folder: Path):
    model = load(tiny_folder, QuantizationSpec(bits=8))
    assert isolation.product_dtype(model) == torch.float16
    with pytest.raises(LoraError, match=r"data\.packing: 8-bit layers .* outlier columns") as caught:
        isolation.settle(model, "auto", packing=True)
    assert "quantization.bits: 8" in str(caught.value.hint)
    assert "data.packing: false" in str(caught.value.hint)
