"""Adapters initialized from weights or activations: the initial values, and the same training losses as in PEFT."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model import fp32_weights, init_adapter, save_adapter
from lora_cli.model.adapter_context import AdapterContext
from tests.model import zoo

RANK, ALPHA = 4, 8
IDS = torch.randint(3, zoo.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))


def plan_of(lengths: list[int], *, packing: bool = True, size: int = 120, join: bool = False) -> BatchPlan:
    return BatchPlan(zoo.rows_of(lengths), packing=packing, size=size, batches_per_step=1, seed=0, join=join)


def peft_pissa(model: torch.nn.Module) -> PeftModel:
    return get_peft_model(model, config_of(init_lora_weights="pissa"))


def peft_olora(model: torch.nn.Module) -> PeftModel:
    return get_peft_model(model, config_of(init_lora_weights="olora"))


def peft_corda(model: torch.nn.Module) -> PeftModel:
    config = config_of(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    rows = zoo.rows_of([30, 41, 12, 25, 60, 7])  # the same as in `zoo.attached`
    order = [i for batch in plan_of([30, 41, 12, 25, 60, 7], size=60).epoch(0) for i in batch]

    def run() -> None:
        for i in order:
            model(input_ids=torch.tensor(rows[i].input_ids[None].astype("int64")))

    preprocess_corda(model, config, run_model=run)
    return get_peft_model(model, config)


def config_of(**options: object) -> LoraConfig:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, task_type="CAUSAL_LM", **options)


def train(model: PeftModel) -> list[float]:
    """Run a few AdamW steps; return their losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """Return the logits of PEFT's forward, which adds in another order than a fused training step."""
    output: Tensor = model(input_ids=IDS).logits
    return output


@pytest.mark.parametrize(
    ("method", "peft_model"), [("pissa", peft_pissa), ("olora", peft_olora), ("corda", peft_corda)]
)
def test_losses_equal_those_of_peft_and_the_base_is_unchanged(
    tmp_path: Path, method: str, peft_model: Callable[[torch.nn.Module], PeftModel]
):
    """PEFT subtracts the initial update from the base weights; here the saved adapter contains the subtraction."""
    ours = zoo.attached(zoo.make("llama"), method=method, rank=RANK, alpha=ALPHA)
    base = {name: t.clone() for name, t in zoo.make("llama").state_dict().items()}
    expected = train(peft_model(zoo.make("llama")))
    losses = train(ours)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert losses[-1] < 0.9 * losses[0]
    state = ours.get_base_model().state_dict()
    base_weights = {name: t for name, t in state.items() if "lora_" not in name}
    assert all(torch.equal(t, base[name.replace("base_layer.", "")]) for name, t in base_weights.items())
    trained = logits(ours)
    save_adapter.save_adapter(ours, tmp_path, base="org/base", revision=None)
    loaded = PeftModel.from_pretrained(zoo.make("llama"), str(tmp_path))
    assert torch.equal(logits(loaded), trained)
    assert loaded.peft_config["default"].r == 2 * RANK


def test_pissa_starts_at_the_largest_singular_components(tmp_path: Path):
    model = zoo.attached(zoo.make("llama"), method="pissa", rank=RANK, alpha=ALPHA)
    for _, layer in init_adapter.lora_layers(model):
        u, s, vh = torch.linalg.svd(layer.get_base_layer().weight)
        # The trained halves of B and A.
        b, a = layer.lora_B["default"].weight[:, :RANK], layer.lora_A["default"].weight[:RANK]
        best = u[:, :RANK] @ torch.diag(s[:RANK]) @ vh[:RANK]
        assert zoo.relative(ALPHA / RANK * b @ a, best) < 1e-4


def inputs_of(name: str, plan: BatchPlan) -> Tensor:
    """Return the inputs of a base layer, [tokens, width] fp32; each row runs alone, so without padding."""
    model, inputs = zoo.make("llama"), []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for i in range(len(plan.rows)):
        model(input_ids=torch.tensor(plan.rows[i].input_ids[None].astype("int64")))
    hook.remove()
    return torch.cat(inputs)


@pytest.mark.parametrize("packing", [True, False])
def test_eva_starts_at_the_principal_components_of_the_inputs(packing: bool):
    """The rows of A are principal components of the layer's inputs; inputs at padding are left out."""
    lengths = [60, 20, 25, 60, 30, 55, 60, 10, 40, 50]
    plan = plan_of(lengths, packing=packing, size=120 if packing else 4)
    context = AdapterContext(total_steps=10, plan=plan)
    model = zoo.attached(zoo.make("llama"), method="eva", rank=RANK, context=context)
    ranks = {name: layer.r["default"] for name, layer in init_adapter.lora_layers(model)}
    assert sum(ranks.values()) == RANK * 14, "EVA redistributes the ranks over the layers; their sum is the same"
    for name in list(ranks)[::3]:
        inputs = inputs_of(name, plan)
        centered = inputs - inputs.mean(dim=0)
        _, _, vh = torch.linalg.svd(centered, full_matrices=False)
        a = model.get_base_model().get_submodule(name).lora_A["default"].weight
        a = a / a.norm(dim=1, keepdim=True)
        # The rows of A lie in the span of the leading components, except for the error of the incremental PCA.
        norm_in_span = (a @ vh[: len(a) + 1].T).norm(dim=1)
        assert float(norm_in_span[: max(1, len(a) - 1)].min()) > 0.97, name


@pytest.mark.parametrize("method", ["eva", "corda"])
@pytest.mark.parametrize("training", [True, False])
def test_initialization_from_rows_leaves_no_hook_no_statistics_and_the_mode(method: str, training: bool):
    base = zoo.make("llama").train(training)
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    model = zoo.attached(base, method=method, rank=RANK)
    assert not hooks_of(model)
    for name, layer in init_adapter.lora_layers(model):
        assert layer.get_base_layer().training is training
        assert set(vars(layer.get_base_layer())) == before[name], name


def test_an_error_in_evas_count_of_vectors_leaves_no_hook():
    base = zoo.make("llama")
    plan = BatchPlan(zoo.rows_of([60], vocabulary=500), packing=True, size=60, batches_per_step=1, seed=0)
    with pytest.raises(IndexError):  # token ids beyond the embeddings
        zoo.attached(base, method="eva", rank=RANK, context=AdapterContext(total_steps=10, plan=plan))
    assert not hooks_of(base)


def hooks_of(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


def test_eva_measures_joined_batches_one_by_one():
    """With tokens_per_batch: auto, the batches of a step, which may be larger than the memory, are joined."""
    plan = plan_of([30, 41, 12, 25, 60, 7, 33, 8], size=60, join=True)
    batches = init_adapter._batches(plan)
    assert [list(batch.rows) for batch in batches] == plan.epoch(0)[: len(batches)]
    assert max(batch.tokens for batch in batches) <= 60


def test_eva_needs_batches_of_enough_tokens():
    context = AdapterContext(total_steps=10, plan=plan_of([5, 6, 7], size=7))
    with pytest.raises(LoraError, match="eva needs batches of at least 8 tokens, twice the rank") as caught:
        zoo.attached(zoo.make("llama"), method="eva", rank=4, context=context)
    assert "lower adapter.rank" in str(caught.value.hint)


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "loftq"])
def test_a_rank_above_the_components_of_a_layer_is_refused(method: str):
    with pytest.raises(LoraError, match=r"adapter\.rank: 48 is more than the components that .* has") as caught:
        zoo.attached(zoo.make("llama"), method=method, rank=48)
    assert "leave such layers out of adapter.target_modules" in str(caught.value.hint)


def test_the_row_scales_are_trained_and_merged_into_b(tmp_path: Path):
    """W + diag(s)·BA: s starts at 1 and is trained; the saved B is diag(s)·B, so plain PEFT can load it."""
    model = zoo.attached(zoo.make("llama"), method="scaled", rank=RANK, alpha=ALPHA)
    scales = {name: p for name, p in model.named_parameters() if name.endswith(".scale")}
    assert len(scales) == 14
    assert all(torch.equal(p, torch.ones_like(p)) for p in scales.values())
    plain = sum(p.numel() for p in zoo.attached(zoo.make("llama"), rank=RANK).parameters() if p.requires_grad)
    rows = sum(layer.out_features for _, layer in init_adapter.lora_layers(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plain + rows
    train(model)
    assert all((p != 1).any() for p in scales.values())
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default"
    layer = model.get_submodule(name)
    b, s = layer.parametrizations.weight.original, scales[f"{name}.parametrizations.weight.0.scale"]
    trained = logits(model)
    save_adapter.save_adapter(model, tmp_path, base="org/base", revision=None)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[name.replace(".default", ".weight")], s[:, None] * b)
    assert not any("scale" in key or "parametrizations" in key for key in saved)
    loaded = PeftModel.from_pretrained(zoo.make("llama"), str(tmp_path))
    assert torch.equal(logits(loaded), trained)


def test_with_freeze_a_only_b_is_trained():
    model = zoo.attached(zoo.make("llama"), freeze_a=True, rank=RANK)
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    train(model)
    changed = {name for name, p in model.named_parameters() if "lora_" in name and not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_B." in name}


def test_virtual_tokens_start_at_the_embeddings_of_init_text():
    base = zoo.make("llama")
    context = AdapterContext(plan=plan_of([10]), encode=lambda text: [ord(letter) - 90 for letter in text])
    model = zoo.attached(base, method="prompt", virtual_tokens=5, init_text="abc", context=context)
    rows = base.get_input_embeddings().weight[torch.tensor([7, 8, 9, 7, 8])]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, rows)
    with pytest.raises(LoraError, match=r"adapter\.init_text: it has no token"):
        zoo.attached(zoo.make("llama"), method="prompt", init_text="", context=context)


def test_pissa_on_a_layer_that_is_not_linear_raises():
    with pytest.raises(LoraError, match=r"embed_tokens is not a linear layer, which this adapter\.method needs"):
        zoo.attached(zoo.make("llama"), method="pissa", target_modules=["embed_tokens", "q_proj"])


def test_remove_parametrizations_does_not_change_the_logits():
    model = zoo.adapted(zoo.make("llama", dtype=torch.bfloat16), method="scaled", modules_to_save=["lm_head"])
    fp32_weights.upcast_trainable_params(model)
    before = copy.deepcopy(model)(input_ids=IDS).logits
    fp32_weights.remove_parametrizations(model)
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    assert torch.equal(model(input_ids=IDS).logits, before)
