"""Adapters of mlx-lm, LitGPT and torchtune on tiny models: random files, and the forward pass that each tool documents.

Nothing here uses the code that is tested. A reference adds the tool's own layer to the base's layers by hooks, or, for
torchtune, computes a llama with rotary embeddings of neighboring dimensions.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

IDS = torch.arange(3, 40)[None]
RANK = 4
Extra = Callable[[Tensor, Tensor], Tensor]  # (input of a layer, its output) -> output with the adapter


class Reference(NamedTuple):
    """An adapter as its tool computes it."""

    logits: Tensor  # [1, seq, vocabulary] of IDS
    updates: dict[str, Tensor]  # ΔW [out, in] by the module's name in transformers


def base_folder(folder: Path, family: str, **options: Any) -> Path:
    """Write a tiny random model of a family of the zoo with a tokenizer."""
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    zoo.make(family, vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@contextmanager
def hooked(model: nn.Module, extras: dict[str, Extra]) -> Iterator[None]:
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output, extra=extra: extra(inputs[0], output))
        for name, extra in extras.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def logits(model: nn.Module, extras: dict[str, Extra] | None = None) -> Tensor:
    with hooked(model, extras or {}):
        return model(IDS).logits


def layers_of(model: nn.Module, *, layer: int | None = None) -> dict[str, nn.Module]:
    """The linear layers of the decoder's blocks, by name; of one block with `layer`."""
    marks = [f".{layer}."] if layer is not None else [".0.", ".1."]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(mark in name for mark in marks)
    }


def sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def write_mlx(
    folder: Path, model: Any, *, scale: float = 3.0, dora: bool = False, modules: dict[str, nn.Module] | None = None,
    theirs: Callable[[str], str] = str, dtype: torch.dtype = torch.float32, config: dict[str, Any] | None = None,
) -> Reference:  # fmt: skip
    """Write an adapter as mlx-lm does: y + scale · (x @ lora_a) @ lora_b, and DoRA by rows: m / ‖W + ΔW‖."""
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Extra] = {}
    updates: dict[str, Tensor] = {}
    for name, module in (modules or layers_of(model)).items():
        inputs, outputs = sizes(module)
        a = (torch.randn(inputs, RANK) * 0.1).to(dtype)
        b = (torch.randn(RANK, outputs) * 0.05).to(dtype)
        tensors |= {f"{theirs(name)}.lora_a": a, f"{theirs(name)}.lora_b": b}
        a, b = a.float(), b.float()
        updates[name] = (scale * (a @ b)).T
        if not dora:
            extras[name] = lambda x, y, a=a, b=b: y + scale * (x @ a) @ b
            continue
        adapted = module.weight + updates[name]
        m = adapted.norm(dim=1) * (1 + 0.1 * torch.randn(outputs))
        tensors[f"{theirs(name)}.m"] = m
        bias = module.bias if getattr(module, "bias", None) is not None else torch.zeros(outputs)
        extras[name] = lambda x, y, weight=adapted, m=m, bias=bias: (m / weight.norm(dim=1)) * linear(x, weight) + bias
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    values = {
        "model": "base", "num_layers": 2, "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"rank": RANK, "scale": scale, "dropout": 0.1},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**values, **(config or {})}))
    return Reference(logits(model, extras), updates)


LIT_LLAMA = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
             "mlp.proj": "mlp.down_proj"}  # fmt: skip
LIT_NEOX = {"attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}


def write_litgpt(
    folder: Path, model: Any, *, family: str, adapted: tuple[bool, bool, bool] = (True, True, True), alpha: float = 10
) -> Reference:
    """Write an adapter as LitGPT does, with one pair of tensors for q, k and v; zeros for those without an adapter."""
    config = model.config
    heads = config.num_attention_heads
    groups = heads if family == "gpt-neox" else config.num_key_value_heads
    size, hidden = config.hidden_size // heads, config.hidden_size
    parts = [rows for rows, use in zip((heads * size, groups * size, groups * size), adapted, strict=True) if use]
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Extra] = {}
    updates: dict[str, Tensor] = {}
    names = LIT_NEOX if family == "gpt-neox" else LIT_LLAMA
    prefix = "gpt_neox.layers" if family == "gpt-neox" else "model.layers"
    scale = alpha / RANK
    for layer in range(config.num_hidden_layers):
        a, b = torch.randn(RANK * len(parts), hidden) * 0.1, torch.randn(sum(parts), RANK) * 0.05
        tensors |= {f"transformer.h.{layer}.attn.qkv.lora_A": a, f"transformer.h.{layer}.attn.qkv.lora_B": b}
        blocks = iter(scale * part_b @ part_a for part_a, part_b in zip(a.split(RANK), b.split(parts), strict=True))
        full = [
            next(blocks) if use else torch.zeros(rows, hidden)
            for rows, use in zip((heads * size, groups * size, groups * size), adapted, strict=True)
        ]
        updates |= _qkv_updates(f"{prefix}.{layer}", full, family, groups)
        if all(adapted):
            for theirs, ours in names.items():
                if family == "phi3" and theirs in ("mlp.fc_1", "mlp.fc_2"):
                    inputs, outputs = hidden, config.intermediate_size
                else:
                    inputs, outputs = sizes(model.get_submodule(f"{prefix}.{layer}.{ours}"))
                a, b = torch.randn(RANK, inputs) * 0.1, torch.randn(outputs, RANK) * 0.05
                key = f"transformer.h.{layer}.{theirs}"
                tensors |= {f"{key}.lora_A": a, f"{key}.lora_B": b}
                updates[f"{prefix}.{layer}.{ours}"] = scale * b @ a
            if family == "phi3":
                gate, up = (updates.pop(f"{prefix}.{layer}.mlp.{part}_proj") for part in ("gate", "up"))
                updates[f"{prefix}.{layer}.mlp.gate_up_proj"] = torch.cat([gate, up])
    if all(adapted):
        head = next(name for name, each in model.named_modules() if each is model.get_output_embeddings())
        a, b = torch.randn(RANK, hidden) * 0.1, torch.randn(config.vocab_size, RANK) * 0.05
        tensors |= {"lm_head.lora_A": a, "lm_head.lora_B": b}
        updates[head] = scale * b @ a
    folder.mkdir()
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    flags = {f"lora_{part}": use for part, use in zip(("query", "key", "value"), adapted, strict=True)}
    training = {"checkpoint_dir": "checkpoints/some/model", "lora_r": RANK, "lora_alpha": alpha, "lora_dropout": 0.05}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({**training, **flags}))
    sizes_ = {"n_head": heads, "n_query_groups": groups, "head_size": size, "hf_config": {"org": "some", "name": "m"}}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(sizes_))
    for name, update in updates.items():
        extras[name] = lambda x, y, update=update: y + linear(x, update)
    return Reference(logits(model, extras), updates)


def _qkv_updates(layer: str, parts: list[Tensor], family: str, groups: int) -> dict[str, Tensor]:
    """ΔW of q, k and v in transformers' modules: three, one with all queries first, or one group after the other."""
    if family == "llama":
        names = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
        return {name: part for name, part in zip(names, parts, strict=True) if part.any()}
    if family == "phi3":
        return {f"{layer}.self_attn.qkv_proj": torch.cat(parts)}
    rows = []
    for group in range(groups):
        for part in parts:
            count = len(part) // groups
            rows.append(part[group * count : (group + 1) * count])
    return {f"{layer}.attention.query_key_value": torch.cat(rows)}


TUNE = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip


@torch.no_grad()
def write_torchtune(folder: Path, model: Any, *, dora: bool = False, alpha: float = 10) -> Reference:
    """Write an adapter of a llama as torchtune does, and compute its logits with torchtune's rotary embeddings."""
    config, scale = model.config, alpha / RANK
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    weights = model.state_dict()
    tensors: dict[str, Tensor] = {}
    adapted: dict[str, Tensor] = {}  # W + ΔW in torchtune's order of rows
    updates: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        for theirs, ours in TUNE.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            count = {"attn.q_proj": heads, "attn.k_proj": groups}.get(theirs)
            if count is not None:
                weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            a, b = torch.randn(RANK, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], RANK) * 0.05
            key, update = f"layers.{layer}.{theirs}", scale * b @ a
            tensors |= {f"{key}.lora_a.weight": a, f"{key}.lora_b.weight": b}
            adapted[key] = weight + update
            if dora:
                norm = adapted[key].norm(dim=1)
                magnitude = norm * (1 + 0.1 * torch.randn(len(norm)))
                tensors[f"{key}.magnitude"] = magnitude
                adapted[key] = (magnitude / norm)[:, None] * adapted[key]
            if count is not None:
                update = update.view(count, -1, 2, update.shape[1]).transpose(1, 2).reshape(update.shape)
            updates[f"model.layers.{layer}.{ours}"] = update
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.pt")
    values = {"r": RANK, "lora_alpha": alpha, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "base"}))
    return Reference(_torchtune_llama(model, adapted), updates)


def _torchtune_llama(model: Any, adapted: dict[str, Tensor]) -> Tensor:
    """The forward pass of a llama whose rotary embeddings turn pairs of neighboring dimensions."""
    config, weights = model.config, model.state_dict()
    heads, groups, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    size = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    angles = torch.arange(IDS.shape[1])[:, None] / theta ** (torch.arange(0, size, 2) / size)

    def rotate(x: Tensor) -> Tensor:  # [heads, seq, size]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    hidden = weights["model.embed_tokens.weight"][IDS[0]]
    mask = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)
    for layer in range(config.num_hidden_layers):
        part = {name.removeprefix(f"layers.{layer}."): each for name, each in adapted.items() if f".{layer}." in name}
        norms = [weights[f"model.layers.{layer}.{each}_layernorm.weight"] for each in ("input", "post_attention")]
        x = rms_norm(hidden, hidden.shape[-1:], norms[0], eps)
        q, k, v = (
            linear(x, part[f"attn.{each}_proj"]).view(len(x), count, size).transpose(0, 1)
            for each, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = rotate(q), rotate(k)
        k, v = (each.repeat_interleave(heads // groups, dim=0) for each in (k, v))
        scores = (q @ k.transpose(1, 2) / size**0.5 + mask).softmax(dim=-1)
        hidden = hidden + linear((scores @ v).transpose(0, 1).reshape(len(x), -1), part["attn.output_proj"])
        x = rms_norm(hidden, hidden.shape[-1:], norms[1], eps)
        hidden = hidden + linear(silu(linear(x, part["mlp.w1"])) * linear(x, part["mlp.w3"]), part["mlp.w2"])
    return linear(rms_norm(hidden, hidden.shape[-1:], weights["model.norm.weight"], eps), weights["lm_head.weight"])[
        None
    ]
