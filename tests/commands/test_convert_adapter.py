"""`lora adapter convert`: plain PEFT computes what mlx-lm, LitGPT and torchtune compute; damage is one error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def config() -> dict[str, Any]:
    return json.loads(Path("out/adapter_config.json").read_text())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_mlx(dora: bool, workdir: Path, lora: Lora):
    reference = foreign_adapters.write_mlx(Path("mlx"), load_base(Path("base")), dora=dora)
    result = convert(lora, "mlx")
    check_against(reference)
    method = "DoRA" if dora else "LoRA"
    assert result.out.splitlines() == [
        f"{method} of mlx-lm on base: 14 modules, rank 4, scale 3, {15744 if dora else 13824:,} parameters",
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
        "parameters": 15744 if dora else 13824, "tensors_read": 42 if dora else 28,
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


Change = Callable[[dict[str, Tensor]], object]


def change_json(**changes: Any) -> Callable[[Path], None]:
    """Return a function that changes keys of a configuration; None removes one."""

    def apply(file: Path) -> None:
        text = file.read_text()
        values = {**(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)), **changes}
        kept = {key: value for key, value in values.items() if value is not None}
        file.write_text(json.dumps(kept))  # JSON is YAML

    return apply


MLX_A, MLX_B = "model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"
MLX_MISTAKES: dict[str, tuple[Change | None, Callable[[Path], None] | None, str]] = {
    "no factor": (lambda t: t.pop(MLX_B), None, "model.layers.0.self_attn.q_proj has no lora_b"),
    "nan": (lambda t: t[MLX_A].fill_(torch.nan), None, f"{MLX_A} has NaN"),
    "another tensor": (lambda t: t.update(bias=torch.zeros(2)), None, "bias is not a tensor of LoRA"),
    "no pair": (lambda t: t.update({MLX_A: torch.zeros(64, 3)}), None, "has factors of 64x3 and 4x64"),
    "experts": (lambda t: t.update({MLX_A: torch.zeros(2, 4, 64)}), None, "adapts the stacked experts"),
    "integers": (lambda t: t.update({MLX_A: torch.zeros(64, 4).int()}), None, "is of torch.int32, not of floats"),
    "other shape": (lambda t: t.update({MLX_A: torch.zeros(32, 4)}), None, "is an update of 64x32, and "),
    "other module": (
        lambda t: t.update({f"model.layers.7.mlp.up_proj.lora_{p}": torch.ones(4, 4) for p in "ab"}), None,
        "adapts model.layers.7.mlp.up_proj, which base does not have",
    ),
    "empty": (lambda t: t.clear(), None, "mlx/adapters.safetensors has no tensors"),
    "no scale": (None, change_json(lora_parameters={"rank": 4}), "has no scale"),
    "no parameters": (None, change_json(lora_parameters=None), "has no lora_parameters"),
    "scale of no number": (None, change_json(lora_parameters={"rank": 4, "scale": "x"}), "scale: x is not a number"),
    "other rank": (None, change_json(lora_parameters={"rank": 5, "scale": 3.0}), "has rank 4, and its configuration"),
    "ambiguous scale": (
        None, change_json(num_layers=None, lora_layers=2, lora_parameters={"rank": 4, "alpha": 8, "scale": 3.0}),
        "mlx-lm up to 0.13 multiplied the updates by 6, later versions by 3",
    ),
    "full": (None, change_json(fine_tune_type="full"), "fine_tune_type: full is no adapter"),
    "dora without magnitudes": (None, change_json(fine_tune_type="dora"), "has no magnitudes of DoRA"),
    "no base": (None, change_json(model=None), "mlx names no base"),
    "absent base": (None, change_json(model="/absent/base"), "names its base /absent/base"),
    "no config": (None, Path.unlink, "mlx has no adapter_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MLX_MISTAKES)
def test_damaged_mlx_adapters_are_one_error(mistake: str, workdir: Path, lora: Lora):
    change_tensors, change_config, message = MLX_MISTAKES[mistake]
    foreign_adapters.write_mlx(Path("mlx"), load_base(Path("base")))
    if change_tensors is not None:
        tensors = load_file("mlx/adapters.safetensors")
        change_tensors(tensors)
        save_file(tensors, "mlx/adapters.safetensors")
    if change_config is not None:
        change_config(Path("mlx/adapter_config.json"))
    check_refused(lora, "mlx", message)


def check_refused(lora: Lora, source: str, message: str, *options: str) -> None:
    result = lora("adapter", "convert", source, "--out", "out", *options)
    assert (result.code, result.out) == (2, "")
    error, hint = result.last_two
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert not Path("out").exists()


def test_alpha_of_newer_mlx_is_told_to_have_no_effect(workdir: Path, lora: Lora):
    parameters = {"rank": 4, "alpha": 16, "scale": 3.0, "dropout": 0.0}
    reference = foreign_adapters.write_mlx(Path("mlx"), load_base(Path("base")), config={"lora_parameters": parameters})
    assert "note: mlx-lm does not use alpha: 16 of its configuration, only scale: 3" in convert(lora, "mlx").err
    check_against(reference)


def test_damaged_litgpt_and_torchtune_adapters_are_one_error(workdir: Path, lora: Lora):
    model = load_base(Path("base"))
    foreign_adapters.write_litgpt(Path("lit"), model, family="llama")
    training, sizes = Path("lit/hyperparameters.yaml"), Path("lit/model_config.yaml")
    text = training.read_text()
    base = ("--base", "base")
    check_refused(lora, "lit", "some/m")  # not in the cache of the hub
    for changes, message in (
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"lora_r": 2}, "has rank 4, and its configuration says 2"),
        ({"lora_key": False}, "attn.qkv has factors of 12x64 and 128x4, which are no pair"),
    ):
        change_json(**changes)(training)
        check_refused(lora, "lit", message, *base)
        training.write_text(text)
    training.write_text("lora_r: [")
    check_refused(lora, "lit", "hyperparameters.yaml is not YAML", *base)
    training.write_text(text)
    change_json(n_head=2)(sizes)
    check_refused(lora, "lit", "attn.qkv has factors of", *base)
    sizes.unlink()
    check_refused(lora, "lit", "model_config.yaml does not exist", *base)

    foreign_adapters.write_torchtune(Path("tune"), model)
    file, config_file = Path("tune/adapter_model.pt"), Path("tune/adapter_config.json")
    whole, text = file.read_bytes(), config_file.read_text()
    file.write_bytes(whole[:1000])
    check_refused(lora, "tune", "adapter_model.pt is damaged")
    file.write_bytes(whole)
    config_file.write_text('{"r": 4}')
    check_refused(lora, "tune", "has no lora_alpha")
    config_file.unlink()
    check_refused(lora, "tune", "tune has no adapter_config.json")
    config_file.write_text(text)
    tensors = torch.load(file)  # noqa: TID251  (the test wrote it)
    torch.save({**tensors, "layers.0.sa_norm.scale": torch.ones(64)}, file)
    check_refused(lora, "tune", "layers.0.sa_norm.scale is not a tensor of LoRA")
    torch.save({**tensors, **{f"encoder.lora_{part}.weight": torch.ones(4, 4) for part in "ab"}}, file)
    check_refused(lora, "tune", "encoder has no place in base, which is llama")
    torch.save(tensors, file)
    base_folder(Path("neox"), "gpt-neox")
    check_refused(lora, "tune", "neox is gpt_neox, whose layers in torchtune are not known here", "--base", "neox")
    base_folder(Path("qwen"), "qwen2")
    torch.save({**tensors, **{
        name.replace("lora_a.weight", "magnitude"): torch.ones(len(tensors[name.replace("_a", "_b")]))
        for name in tensors if "lora_a" in name
    }}, file)  # fmt: skip
    check_refused(lora, "tune", "is DoRA of a layer with a bias", "--base", "qwen")


def test_hostile_pickles_do_nothing(workdir: Path, lora: Lora):
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (Path("created-by-pickle"),)

    for name in ("adapter_model.bin", "adapter_model.pt", "lit_model.pth.lora"):
        folder = Path(name.replace(".", "-"))
        folder.mkdir()
        torch.save({"model": Hostile(), "a": Hostile()}, folder / name)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
        (folder / "hyperparameters.yaml").write_text("{lora_r: 4, lora_alpha: 8}")
        (folder / "model_config.yaml").write_text("{n_head: 4, n_query_groups: 4, head_size: 16}")
        check_refused(lora, str(folder), "its pickle has a call of pathlib", "--base", "base")
    (Path("lit_model-pth-lora") / "hyperparameters.yaml").write_text("!!python/object/apply:os.mkdir [created]")
    check_refused(lora, "lit_model-pth-lora", "hyperparameters.yaml is not YAML")
    assert not Path("created-by-pickle").exists()
    assert not Path("created").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent does not exist"),
        (["base"], "base has no adapter of mlx-lm, LitGPT, torchtune or PEFT"),
        (["mlx", "--from", "litgpt"], "mlx has no adapter of LitGPT"),
        (["mlx", "--from", "axolotl"], "--from axolotl is not known"),
        (["rows.jsonl"], "rows.jsonl: its name is none of a known tool"),
        (["both"], "both has several adapters: adapters.npz, adapters.safetensors"),
        (["mlx", "--base", "absent"], "absent"),
        (["mlx", "--base", "rows.jsonl"], ""),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, workdir: Path, lora: Lora):
    for folder, names in {"mlx": ["adapters.safetensors"], "both": ["adapters.safetensors", "adapters.npz"]}.items():
        Path(folder).mkdir()
        for name in names:
            save_file({MLX_A: torch.ones(64, 4), MLX_B: torch.ones(4, 64)}, Path(folder, name))
        parameters = {"rank": 4, "scale": 1.0}
        Path(folder, "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": parameters}))
    check_refused(lora, arguments[0], message, *arguments[1:])


def test_a_base_in_the_format_of_mlx_is_refused(workdir: Path, lora: Lora):
    foreign_adapters.write_mlx(Path("mlx"), load_base(Path("base")), config={"model": "quantized"})
    shutil.copytree("base", "quantized")
    quantization = {"group_size": 64, "bits": 4}
    change_json(quantization=quantization, quantization_config=quantization)(Path("quantized/config.json"))
    check_refused(lora, "mlx", "quantized is quantized by mlx-lm, which transformers does not load")
    result = convert(lora, "mlx", "--base", "base")
    assert "note: trained on quantized, and converted for base" in result.err
