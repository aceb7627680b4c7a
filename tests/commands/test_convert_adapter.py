"""`lora adapter convert`: plain PEFT computes what mlx-lm, LitGPT and torchtune compute; damage is one error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_cli
from lora_cli.model.foreign_adapters import litgpt, mlx, torchtune
from tests.commands.conftest import CommandResult, Lora
from tests.support import foreign_adapters
from tests.support.foreign_adapters import Reference, base_folder, layers_of, load_base, logits


def convert(lora: Lora, source: str, *options: str) -> CommandResult:
    result = lora("adapter", "convert", source, "--out", "out", *options)
    assert result.code == 0, result.err
    return result


@torch.no_grad()
def check_against(reference: Reference, base: str = "base") -> PeftModel:
    """Compare what plain PEFT computes from the folder `out` with the tool: ΔW of each module, and logits."""
    model = PeftModel.from_pretrained(load_base(Path(base)), "out").eval()
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert layers.keys() == reference.updates.keys()
    for name, layer in layers.items():
        update: Tensor = layer.get_delta_weight("default")
        if layer.fan_in_fan_out:
            update = update.T
        assert torch.allclose(update, reference.updates[name], atol=1e-6, rtol=1e-5), name
    found, plain = logits(model), logits(load_base(Path(base)))
    size = reference.logits.abs().max()
    assert float((found - reference.logits).abs().max() / size) < 1e-5
    assert float((plain - reference.logits).abs().max() / size) > 1e-2, "the adapter must change something"
    return model


def parameters(reference: Reference, dora: bool) -> int:
    """Factors of rank 4, and DoRA's magnitudes."""
    return sum(4 * sum(update.shape) + dora * len(update) for update in reference.updates.values())


def config() -> dict[str, Any]:
    return json.loads(Path("out/adapter_config.json").read_text())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_mlx(dora: bool, workdir: Path, lora: Lora):
    reference = foreign_adapters.write_mlx(Path("mlx"), load_base(Path("base")), dora=dora)
    result = convert(lora, "mlx")
    check_against(reference)
    method = "DoRA" if dora else "LoRA"
    assert result.out.splitlines() == [
        f"{method} of mlx-lm on base: 14 modules, rank 4, scale 3, {parameters(reference, dora):,} parameters",
        "out",
    ]
    assert f"{42 if dora else 28} tensors read, and all used" in result.err
    values = config()
    assert (values["r"], values["lora_alpha"], values["use_dora"], values["use_rslora"]) == (4, 12, dora, False)
    assert (values["base_model_name_or_path"], values["lora_dropout"], values["task_type"]) == (
        "base",
        0.1,
        "CAUSAL_LM",
    )
    assert values["target_modules"] == sorted(f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down"))


def test_mlx_with_the_last_layer_only_in_npz_and_bf16(workdir: Path, lora: Lora):
    model = load_base(Path("base"))
    modules = {name: each for name, each in layers_of(model, layer=1).items() if "self_attn" in name}
    reference = foreign_adapters.write_mlx(
        Path("mlx"), model, modules=modules, config={"num_layers": 1}, dtype=torch.bfloat16
    )
    convert(lora, "mlx")
    check_against(reference)
    assert config()["target_modules"] == sorted(modules), "names without numbers would match layer 0 too"
    assert {tensor.dtype for tensor in load_file("out/adapter_model.safetensors").values()} == {torch.bfloat16}
    tensors = load_file("mlx/adapters.safetensors")
    Path("mlx/adapters.safetensors").unlink()
    np.savez("mlx/adapters.npz", **{name: tensor.float().numpy() for name, tensor in tensors.items()})
    convert(lora, "mlx", "--force")
    check_against(reference)


def test_mlx_embeddings_of_a_tied_model_become_embeddings_and_head(workdir: Path, lora: Lora):
    base_folder(Path("tied"), "llama-tied")
    model = load_base(Path("tied"))
    rows, size = model.get_input_embeddings().weight.shape
    a, b = torch.randn(rows, 4) * 0.1, torch.randn(4, size) * 0.1
    Path("mlx").mkdir()
    save_file({"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, "mlx/adapters.safetensors")
    parameters = {"rank": 4, "scale": 2.0, "keys": ["model.embed_tokens"]}
    Path("mlx/adapter_config.json").write_text(
        json.dumps({"model": "tied", "num_layers": 0, "lora_parameters": parameters})
    )
    ids = foreign_adapters.IDS
    extras = {
        "model.embed_tokens": lambda x, y: y + 2 * a[ids] @ b,
        "lm_head": lambda x, y: y + 2 * (x @ b.T) @ a.T,
    }
    convert(lora, "mlx")
    check_against(Reference(logits(model, extras), {"model.embed_tokens": 2 * a @ b, "lm_head": 2 * a @ b}), "tied")


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("llama", (True, True, True)),
        ("llama", (True, False, True)),
        ("phi3", (True, True, True)),
        ("phi3", (False, True, False)),
        ("gpt-neox", (True, True, True)),
    ],
)
def test_litgpt(family: str, adapted: tuple[bool, bool, bool], workdir: Path, lora: Lora):
    base_folder(Path("model"), family)
    reference = foreign_adapters.write_litgpt(Path("lit"), load_base(Path("model")), family=family, adapted=adapted)
    result = convert(lora, "lit", "--base", "model")
    check_against(reference, "model")
    assert "note: trained on some/m, and converted for model" in result.err
    values = config()
    blocks = sum(adapted) if family != "llama" else 1
    pattern = {name: rank for name, rank in values["rank_pattern"].items() if "qkv" in name or "query_key" in name}
    assert blocks == 1 or values["r"] == 4 * blocks or set(pattern.values()) == {4 * blocks}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_torchtune(dora: bool, workdir: Path, lora: Lora):
    reference = foreign_adapters.write_torchtune(Path("tune"), load_base(Path("base")), dora=dora)
    result = convert(lora, "tune", "--json")
    check_against(reference)
    report = json.loads(result.out)
    assert report == {
        "out": "out", "source": "tune/adapter_model.pt", "tool": "torchtune", "base": "base",
        "method": "dora" if dora else "lora", "modules": 14, "ranks": [4], "scales": [2.5],
        "parameters": parameters(reference, dora), "tensors_read": 42 if dora else 28,
        "tensors_written": 42 if dora else 28, "largest_difference": report["largest_difference"], "notes": [],
    }  # fmt: skip
    assert report["largest_difference"] < 1e-6


def test_torchtune_without_permuted_rows_and_with_fused_weights(workdir: Path, lora: Lora):
    for family in ("qwen2", "phi3"):
        base_folder(Path(family), family)
        model, tensors, updates = load_base(Path(family)), {}, {}
        hidden, size = 64, 16
        outputs = {"q_proj": 4 * size, "v_proj": 2 * size}
        for layer in range(2):
            made = {}
            for part, rows in outputs.items():
                a, b = torch.randn(4, hidden) * 0.1, torch.randn(rows, 4) * 0.05
                key = f"layers.{layer}.attn.{part}"
                tensors |= {f"{key}.lora_a.weight": a, f"{key}.lora_b.weight": b}
                made[part] = 0.5 * b @ a
            attention = f"model.layers.{layer}.self_attn"
            if family == "qwen2":
                updates |= {f"{attention}.{part}": update for part, update in made.items()}
            else:
                empty = torch.zeros(2 * size, hidden)
                updates[f"{attention}.qkv_proj"] = torch.cat([made["q_proj"], empty, made["v_proj"]])
        Path(f"tune-{family}").mkdir()
        torch.save(tensors, f"tune-{family}/adapter_3.pt")
        Path(f"tune-{family}/adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
        extras = {
            name: lambda x, y, update=update: y + torch.nn.functional.linear(x, update)
            for name, update in updates.items()
        }
        convert(lora, f"tune-{family}", "--base", family, "--force")
        check_against(Reference(logits(model, extras), updates), family)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_factors_of_different_dtypes_are_not_rounded(
    dtypes: tuple[torch.dtype, torch.dtype], workdir: Path, lora: Lora
):
    """An adapter whose values fit both dtypes computes the same from a file in fp32 as from one in two dtypes."""
    foreign_adapters.write_torchtune(Path("tune"), load_base(Path("base")), dora=True)
    file = "tune/adapter_model.pt"
    stored = {
        name: tensor.to(dtypes["lora_a" not in name])
        for name, tensor in torch.load(file).items()  # noqa: TID251  (the test wrote it)
    }
    written = []
    for tensors in (stored, {name: tensor.float() for name, tensor in stored.items()}):
        torch.save(tensors, file)
        convert(lora, "tune", "--force")
        written.append(load_file("out/adapter_model.safetensors"))
    assert written[0].keys() == written[1].keys()
    assert all(tensor.float().equal(written[1][name]) for name, tensor in written[0].items())


def write_pickled(folder: Path, peft_config: Any) -> dict[str, Tensor]:
    """Write a PEFT adapter with random values as older versions of PEFT did."""
    model = get_peft_model(load_base(Path("base")), peft_config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    return tensors


@pytest.mark.parametrize(
    "peft_config",
    [LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
     IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")],
    ids=["dora", "ia3"],
)  # fmt: skip
def test_pickled_peft_of_any_method(peft_config: Any, workdir: Path, lora: Lora):
    tensors = write_pickled(Path("old"), peft_config)
    shutil.copy("base/tokenizer_config.json", "old")
    shutil.copy("base/tokenizer.json", "old")
    convert(lora, "old", "--base", "base")
    written = load_file("out/adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert Path("out/tokenizer.json").is_file()
    PeftModel.from_pretrained(load_base(Path("base")), "out")
    again = lora("adapter", "convert", "out", "--out", "again")
    assert again.last_two == ["error: out is a PEFT adapter already", "hint: use it as it is"]


def test_the_scale_of_a_pickled_adapter_is_shown(workdir: Path, lora: Lora):
    write_pickled(Path("old"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    file = Path("old/adapter_config.json")
    values = json.loads(file.read_text())
    del values["lora_alpha"]
    file.write_text(json.dumps(values))
    result = lora("adapter", "convert", "old", "--out", "out", "--base", "base")
    assert "2 modules, rank 4, scale 2, 1,024 parameters" in result.out
    assert "note: adapter_config.json has no lora_alpha: PEFT's default is 8" in result.err


def test_a_converted_adapter_is_merged_as_any_other(workdir: Path, lora: Lora):
    reference = foreign_adapters.write_torchtune(Path("tune"), load_base(Path("base")))
    convert(lora, "tune")
    merged = lora("merge", "out", "--out", "merged", "--verify", "tensors")
    assert merged.code == 0, merged.err
    found = logits(load_base(Path("merged")))
    assert float((found - reference.logits).abs().max() / reference.logits.abs().max()) < 1e-5


@pytest.mark.parametrize("command", ["merge", "export", "chat", "eval", "resize"])
def test_other_commands_say_how_to_convert(command: str, workdir: Path, lora: Lora):
    arguments: dict[str, Callable[[str], list[str]]] = {
        "merge": lambda path: ["merge", path, "--out", "x"],
        "export": lambda path: ["export", path, "--to", "peft", "--out", "x"],
        "chat": lambda path: ["chat", path],
        "eval": lambda path: ["eval", path],
        "resize": lambda path: ["adapter", "resize", path, "--rank", "2", "--out", "x"],
    }
    for tool, name in {
        "mlx-lm": "adapters.safetensors", "LitGPT": "lit_model.pth.lora", "torchtune": "adapter_0.pt",
        "PEFT (pickled)": "adapter_model.bin",
    }.items():  # fmt: skip
        folder = Path(f"foreign-{len(name)}")
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
        (folder / "adapter_config.json").touch()
        for path in (folder, folder / name):
            result = lora(*arguments[command](str(path)))
            assert (result.code, result.last_two) == (
                2,
                [f"error: {path} is an adapter of {tool}: {name}",
                 f"hint: convert it: lora adapter convert {path} --out DIR"],
            )  # fmt: skip


def test_alpha_of_newer_mlx_is_told_to_have_no_effect(workdir: Path, lora: Lora):
    parameters = {"rank": 4, "alpha": 16, "scale": 3.0, "dropout": 0.0}
    reference = foreign_adapters.write_mlx(Path("mlx"), load_base(Path("base")), config={"lora_parameters": parameters})
    assert "note: mlx-lm does not use alpha: 16 of its configuration, only scale: 3" in convert(lora, "mlx").err
    check_against(reference)


def test_the_docs_list_the_architectures_of_each_tool():
    text = (Path(lora_cli.__file__).parents[1] / "docs/adapters.md").read_text()
    for tool, families in {"mlx": mlx.FAMILIES, "litgpt": litgpt.FAMILIES, "torchtune": torchtune.FAMILIES}.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{tool}` |"))
        assert row.split("|")[3].split(", ") == [f" {min(families)}", *sorted(families)[1:-1], f"{max(families)} "]
