"""The model that a recipe describes, built and told about: base, head, attention, adapter, and how they compute."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lora_cli.data.batches import BatchPlan
from lora_cli.errors import LoraError
from lora_cli.model import (
    attach_adapter,
    base_model,
    fp32_weights,
    fused_lora,
    memory,
    select_attention,
    target_modules,
)
from lora_cli.model.adapter_context import AdapterContext, StateDict
from lora_cli.model.loss import LossFunction
from lora_cli.model.quantize import quantized_bytes
from lora_cli.recipe.schema import Recipe
from lora_cli.run import console
from lora_cli.setup.inputs import RunInputs
from lora_cli.training import model_card
from lora_cli.training.optimizer import choose_optimizer, moment_bytes

Info = Callable[[str], None]
MAX_PADDING_EFFECT = 0.05  # relative change of logits beside a longer row: rounding in bf16 is well below it


class BaseForTraining(NamedTuple):
    """The base model, ready to be measured or adapted."""

    model: PreTrainedModel
    heads: tuple[str, ...]  # modules that are trained whole with any adapter
    proof: select_attention.LeakCheck | None  # of packed rows kept apart


class TrainableModel(NamedTuple):
    """The model with its adapter, ready to train."""

    model: PeftModel
    trainable: int  # parameters
    proof: select_attention.LeakCheck | None
    optimizer: str  # which one training.optimizer stands for


def load_base(recipe: Recipe, opening: RunInputs, *, info: Info = console.no_output) -> BaseForTraining:
    """The base model, frozen, with the head of the task and the attention that suits it; with packing, the proof that
    rows are apart.
    """
    loaded = base_model.load_base(
        opening.source,
        dtype=opening.dtype,
        device=opening.device,
        attention=None if recipe.model.attention == "auto" else recipe.model.attention,
        quantization=recipe.quantization,
        task=recipe.task,
        labels=opening.data.labels,
        vocabulary=len(opening.tokenizer) if recipe.model.new_tokens else 0,
        pad_id=opening.pad_id,
        seed=recipe.training.seed,
    )
    for note in loaded.notes:
        info(note)
    proof = select_attention.choose_attention(
        loaded.model, recipe.model.attention, packing=bool(recipe.data.packing), causal=recipe.task == "causal-lm"
    )
    return BaseForTraining(loaded.model, loaded.heads, proof)


def context(
    recipe: Recipe, opening: RunInputs, *, heads: tuple[str, ...], plan: BatchPlan | None, total: int
) -> AdapterContext:
    """What the adapter is made for; without a plan, only its shapes count."""

    def encode(text: str) -> list[int]:
        ids: list[int] = opening.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return AdapterContext(
        task=recipe.task,
        heads=heads,
        total_steps=total,
        plan=plan,
        encode=encode,
        originals=partial(_unquantized_weights, recipe, opening),
    )


def _unquantized_weights(recipe: Recipe, opening: RunInputs) -> StateDict:
    """The base's weights as they were before they were quantised, on the CPU."""
    whole = base_model.load_base(
        opening.source,
        dtype=opening.dtype,
        device=torch.device("cpu"),
        task=recipe.task,
        labels=opening.data.labels,
        seed=recipe.training.seed,
    )
    weights: StateDict = whole.model.state_dict()
    return weights


def build_model(recipe: Recipe, opening: RunInputs, plan: BatchPlan, *, total: int, info: Info) -> TrainableModel:
    """Load the base, choose its attention, put the adapter on it, and say what was done."""
    optimizer = resolve_optimizer(recipe, opening)
    based = load_base(recipe, opening, info=info)
    model, proof = based.model, based.proof
    layers = target_modules.linear_layers(model, based.heads)
    check_new_tokens_trainable(recipe, model)
    peft_model = attach_adapter.attach(
        model,
        recipe.adapter,
        seed=recipe.training.seed,
        context=context(recipe, opening, heads=based.heads, plan=plan, total=total),
    )
    where = f"{str(opening.dtype).removeprefix('torch.')} on {opening.device}"
    info(f"{model_card.redact_path(recipe.model.path)}: {where}, attention {model.config._attn_implementation}")
    for line in describe_quantization(recipe, opening):
        info(line)
    taken, weights = quantized_bytes(model)
    if weights:
        info(f"  {weights:,} weights in {console.format_bytes(taken)}: {taken / weights:.3f} bytes each")
    if proof:
        seen = f"by {proof.leak:.0e} of their size" if proof.leak else "by nothing"
        info(f"packing tried on this model: changing one row changes its neighbour's logits {seen}")
    if recipe.training.optimizer == "auto":
        info(f"optimizer: {optimizer} (auto)")
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    for line in coverage_table(peft_model, layers, trainable):
        info(line)
    if _use_gradient_checkpointing(recipe, opening, model, trainable, plan.max_tokens, info):
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    prepare_for_compute(peft_model)
    probe = plan.make_batch([int(opening.data.train.lengths[:64].argmin())])
    attach_adapter.check_gradients_reach(peft_model, lambda: LossFunction(peft_model, task=recipe.task)(probe).loss)
    if recipe.task == "seq-cls" and peft_model.active_peft_config.is_prompt_learning:
        _refuse_class_of_padding(peft_model, recipe, opening, plan)
    return TrainableModel(
        peft_model, sum(p.numel() for p in peft_model.parameters() if p.requires_grad), proof, optimizer
    )


def _refuse_class_of_padding(model: PeftModel, recipe: Recipe, opening: RunInputs, plan: BatchPlan) -> None:
    """Decoders read the class at the last token, which transformers cannot tell from padding behind virtual tokens."""
    lengths = opening.data.train.lengths[:64]
    short, long = int(lengths.argmin()), int(lengths.argmax())
    if recipe.training.batch_size == 1 or lengths[short] == lengths[long]:
        return
    loss_fn = LossFunction(model, task=recipe.task)
    training = model.training
    model.eval()
    with torch.no_grad():
        alone, padded = (loss_fn.logits(plan.make_batch(rows))[0].float() for rows in ([short], [short, long]))
    model.train(training)
    if float((alone - padded).abs().max() / alone.abs().max().clamp_min(1e-12)) > MAX_PADDING_EFFECT:
        raise LoraError(
            f"adapter.method: {recipe.adapter.method} lets this model read the class of a shorter row at its padding",
            hint="set training.batch_size: 1 and raise training.gradient_accumulation, or write method: prefix or lora",
        )


def check_new_tokens_trainable(recipe: Recipe, model: PreTrainedModel) -> None:
    """New tokens need a trained embedding: single ones, which the rules see to, or all of them."""
    spec = recipe.adapter
    untaught = [token for token in recipe.model.new_tokens if token not in (spec.trainable_tokens or ())]
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    if untaught and embeddings not in target_modules.find_modules(model, spec.modules_to_save or ()):
        raise LoraError(
            f"model.new_tokens: nothing teaches {untaught[0]!r}: adapter.modules_to_save does not have {embeddings}",
            hint=f"add {embeddings.rpartition('.')[2]} to it, and the head where it is not tied; "
            "or list the token in adapter.trainable_tokens",
        )


def resolve_optimizer(recipe: Recipe, opening: RunInputs) -> str:
    """The optimizer that the recipe asks for, or that auto chooses here.

    Raises:
        LoraError: this machine does not have it.
    """
    quantized = recipe.quantization is not None or opening.prequantized is not None
    return choose_optimizer(recipe.training.optimizer, device=opening.device, quantized=quantized)


def prepare_for_compute(model: PeftModel) -> None:
    """Put a fresh or loaded adapter into the arithmetic of training: held in fp32, computed in its layer's dtype."""
    fused_lora.fuse(model)
    fp32_weights.upcast_trainable_params(model)


def describe_quantization(recipe: Recipe, opening: RunInputs) -> list[str]:
    """How the base's weights are held in memory, where it is not plainly in the dtype of the run."""
    spec = recipe.quantization
    if opening.prequantized is not None:
        return [f"  its weights are quantised already: {opening.prequantized.method}"]
    if spec is None:
        return []
    if spec.bits == 8:
        return ["  its linear layers: int8 (LLM.int8)"]
    double = ", scales quantised too" if spec.double_quant else ""
    return [f"  its linear layers: 4-bit {spec.type}{double}, computed in {spec.compute_dtype}"]


def coverage_table(model: PeftModel, layers: dict[str, torch.nn.Module], trainable: int) -> list[str]:
    """Which kinds of layers carry the adapter, and what else is trained, line by line."""
    if model.active_peft_config.is_prompt_learning:
        count = model.active_peft_config.num_virtual_tokens
        return [f"adapter: {count} virtual tokens before each row", f"  {trainable:,} trainable parameters in all"]
    rows = attach_adapter.coverage(model, layers)
    width = max((len(row.kind) for row in rows), default=0)
    lines = [
        f"  {row.kind:{width}}  {row.matched:>4}/{row.layers} layers  {row.parameters:>13,} parameters" for row in rows
    ]
    beside = trainable - sum(row.parameters for row in rows)
    whole = [f"  {beside:,} parameters beside: heads, embeddings of tokens, biases, vectors"] if beside else []
    return ["adapter on:", *lines, *whole, f"  {trainable:,} trainable parameters in all"]


def _use_gradient_checkpointing(
    recipe: Recipe, opening: RunInputs, model: Any, trainable: int, tokens: int, info: Info
) -> bool:
    """Whether to recompute activations; `auto` does so where the memory plan does not fit otherwise."""
    wanted = recipe.training.gradient_checkpointing
    if wanted != "auto":
        return wanted
    if recipe.adapter.method == "prefix":
        return False  # its keys and values come in the cache, which recomputation has none of
    estimate = memory.plan_memory(
        model,
        dtype=opening.dtype,
        trainable=trainable,
        tokens=tokens,
        longest=int(opening.data.train.lengths.max()),
        checkpointing=False,
        quantization=recipe.quantization,
        on_cpu=opening.device.type == "cpu",
        moment_bytes=moment_bytes(resolve_optimizer(recipe, opening)),
    )
    # The weights are loaded by now, so what is free has to hold the rest.
    rest, free = estimate.total - estimate.weights - estimate.process, memory.available_memory(opening.device)
    if rest > 0.9 * free:
        need, left = console.format_bytes(rest), console.format_bytes(free)
        info(f"gradient checkpointing: on, a step needs about {need} and {left} is free")
        return True
    return False
