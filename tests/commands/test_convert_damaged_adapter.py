"""`lora adapter convert` on damaged, hostile and unsuitable input: one error and one hint, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.commands.conftest import Lora
from tests.commands.test_convert_adapter import write_pickled
from tests.support import foreign_adapters
from tests.support.foreign_adapters import base_folder, load_base

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
    "scale beyond floats": (
        None, change_json(lora_parameters={"rank": 4, "scale": 10**400}), "is not a number from 1e-12 to 1e12",
    ),
    "rank beyond floats": (
        None, change_json(lora_parameters={"rank": 10**400, "scale": 3.0}), "is not an integer above 0",
    ),
    "values beyond float32": (
        lambda t: t.update({MLX_A: t[MLX_A].double() * 1e200}), None, f"{MLX_A} has values that float32 does not have",
    ),
    "values below float32": (
        lambda t: t.update({MLX_A: t[MLX_A].double() * 1e-200}), None, f"{MLX_A} has values that float32 does not have",
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


@pytest.mark.parametrize("shape", [(63,), (1,), (0,), (), (1, 64)])
def test_magnitudes_that_are_not_one_for_each_output(shape: tuple[int, ...], workdir: Path, lora: Lora):
    for tool, file, key, name in (
        ("mlx", "adapters.safetensors", MLX_A.replace("lora_a", "m"), "model.layers.0.self_attn.q_proj"),
        ("tune", "adapter_model.pt", "layers.0.attn.q_proj.magnitude", "layers.0.attn.q_proj"),
    ):
        model = load_base(Path("base"))
        if tool == "mlx":
            foreign_adapters.write_mlx(Path("mlx"), model, dora=True)
            tensors = load_file("mlx/adapters.safetensors")
            save_file({**tensors, key: torch.ones(shape)}, "mlx/adapters.safetensors")
        else:
            foreign_adapters.write_torchtune(Path("tune"), model, dora=True)
            tensors = torch.load(f"tune/{file}")  # noqa: TID251  (the test wrote it)
            torch.save({**tensors, key: torch.ones(shape)}, f"tune/{file}")
        shown = "x".join(map(str, shape)) or "a single number"
        check_refused(lora, tool, f"{name} has magnitudes of DoRA of shape {shown}, for 64 outputs", "--base", "base")


PEFT_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
PEFT_MISTAKES: dict[str, tuple[Change | None, dict[str, Any], str]] = {
    "nan": (lambda t: t[PEFT_A].fill_(torch.nan), {}, f"old/adapter_model.bin: {PEFT_A} has 256 of 256 values"),
    "other rank of a layer": (
        lambda t: t.update({PEFT_A: torch.ones(8, 64), PEFT_A.replace("A", "B"): torch.ones(64, 8)}), {},
        "old: adapter_config.json and adapter_model.bin do not belong together: model.layers.0.self_attn.q_proj has "
        "rank 8, and 4 in the configuration",
    ),
    "no pair": (
        lambda t: t.update({PEFT_A: torch.ones(3, 64)}), {}, "model.layers.0.self_attn.q_proj has factors A and B of "
        "3x64 and 64x4",
    ),
    "other shape": (lambda t: t.update({PEFT_A: torch.ones(4, 32)}), {}, "old does not fit base: size mismatch for "),
    "alpha is infinite": (None, {"lora_alpha": float("inf")}, "lora_alpha: inf is not a finite number"),
    "absent base": (None, {"base_model_name_or_path": "absent/base"}, "old names its base absent/base"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PEFT_MISTAKES)
def test_damaged_pickled_adapters_are_one_error(mistake: str, workdir: Path, lora: Lora):
    change_tensors, changes, message = PEFT_MISTAKES[mistake]
    tensors = write_pickled(Path("old"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    change_json(**{"base_model_name_or_path": "base", **changes})(Path("old/adapter_config.json"))
    if change_tensors is not None:
        change_tensors(tensors)
        torch.save(tensors, "old/adapter_model.bin")
    check_refused(lora, "old", message)


def check_refused(lora: Lora, source: str, message: str, *options: str) -> None:
    result = lora("adapter", "convert", source, "--out", "out", *options)
    assert (result.code, result.out) == (2, "")
    error, hint = result.last_two
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")
    assert ".tmp-" not in error + hint
    assert not Path("out").exists()


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
    laughs = "".join(f"a{depth}: &a{depth} [{f'*a{depth - 1}, ' * 9}]\n" for depth in range(1, 30))
    for content, problem in (
        ("lora_r: [", "line 1: a value is expected here"),
        (f"a0: &a0 []\n{laughs}lora_r: *a29\n", "more than 5,000 values, aliases expanded"),
        ("[" * 50_000, "nested more than 16 levels deep"),
        ("a: &a\n  <<: *a", "alias *a is inside the value that it refers to"),
        ("? [a]\n: 1", "a list or section as a key"),
        ("a: 1\n---\nb: 1", "a second YAML document starts here"),
    ):
        training.write_text(content)
        check_refused(lora, "lit", "hyperparameters.yaml is not YAML that is read here: ", *base)
        check_refused(lora, "lit", problem, *base)
    training.write_text(text.replace("lora_r: 4", f"lora_r: 1{'0' * 400}"))
    check_refused(lora, "lit", "is not an integer above 0", *base)
    training.write_text(text)
    for changes, message in (
        ({"n_head": 2}, "model_config.yaml: n_head: 2, and base has num_attention_heads: 4"),
        ({"n_head": 4, "n_layer": 16}, "model_config.yaml: n_layer: 16, and base has num_hidden_layers: 2"),
        ({"n_layer": 2, "n_query_groups": 4}, "attn.qkv has factors of"),
    ):
        change_json(**changes)(sizes)
        check_refused(lora, "lit", message, *base)
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


def test_the_halves_of_a_fused_weight_have_its_rows(workdir: Path, lora: Lora):
    """Otherwise the rows of one part would be an update of the other's."""
    model = load_base(base_folder(Path("phi"), "phi3"))
    foreign_adapters.write_litgpt(Path("lit"), model, family="phi3")
    foreign_adapters.write_torchtune(Path("tune"), load_base(Path("base")))
    file = "lit/lit_model.pth.lora"
    content = torch.load(file)["model"]  # noqa: TID251  (the test wrote it)
    for part in ("fc_1", "fc_2"):
        key = f"transformer.h.0.mlp.{part}.lora_B"
        for rows in (content[key][:-2], torch.cat([content[key]] * 2)):
            torch.save({"model": {**content, key: rows}}, file)
            message = f"mlp.{part} has {len(rows)} outputs, and phi has {len(content[key])} there"
            check_refused(lora, "lit", message, "--base", "phi")
    tensors = torch.load("tune/adapter_model.pt")  # noqa: TID251  (the test wrote it)
    for part in ("attn.q_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
        key = f"layers.0.{part}.lora_b.weight"
        torch.save({**tensors, key: torch.ones(7, 4)}, "tune/adapter_model.pt")
        check_refused(lora, "tune", f"{part} has 7 outputs, and phi has ", "--base", "phi")


def test_hostile_pickles_do_nothing(workdir: Path, lora: Lora):
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("created-by-pickle",)

    for name in ("adapter_model.bin", "adapter_model.pt", "lit_model.pth.lora"):
        folder = Path(name.replace(".", "-"))
        folder.mkdir()
        torch.save({"model": Hostile(), "a": Hostile()}, folder / name)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
        (folder / "hyperparameters.yaml").write_text("{lora_r: 4, lora_alpha: 8}")
        (folder / "model_config.yaml").write_text("{n_head: 4, n_query_groups: 4, head_size: 16}")
        check_refused(lora, str(folder), "its pickle has a call of posix.mkdir", "--base", "base")
    (Path("lit_model-pth-lora") / "hyperparameters.yaml").write_text("!!python/object/apply:os.mkdir [created]")
    check_refused(lora, "lit_model-pth-lora", "hyperparameters.yaml is not YAML that is read here")
    assert not Path("created-by-pickle").exists()
    assert not Path("created").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent does not exist"),
        (["base"], "base has no adapter of mlx-lm, LitGPT, torchtune or PEFT"),
        (["mlx", "--from", "litgpt"], "mlx has no adapter of LitGPT"),
        (["mlx", "--from", "axolotl"], "--from axolotl is not known"),
        (["rows.jsonl"], "rows.jsonl does not have the name of a file of a known tool"),
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
    result = lora("adapter", "convert", "mlx", "--out", "out", "--base", "base")
    assert result.code == 0, result.err
    assert "note: trained on quantized, and converted for base" in result.err
