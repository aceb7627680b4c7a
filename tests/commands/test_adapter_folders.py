"""Adapters as commands meet them: other bases are refused, damage is one error, no path of the machine is published."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands.conftest import CommandResult, Lora, WriteRecipe, remove_checksums

WEIGHTS = "adapter_model.safetensors"
COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "runs/a", "--out", "out"],
    "export peft": ["export", "runs/a", "--to", "peft", "--out", "out"],
    "export vllm": ["export", "runs/a", "--to", "vllm", "--out", "out"],
    "export gguf-adapter": ["export", "runs/a", "--to", "gguf-adapter", "--out", "out.gguf"],
    "export safetensors": ["export", "runs/a", "--to", "safetensors", "--out", "out"],
    "chat": ["chat", "runs/a"],
    "chat beside another": ["chat", "runs/b", "--adapter", "runs/a"],
    "eval": ["eval", "runs/a"],
    "eval of a recipe": ["eval", "recipe.yaml"],
    "eval beside another": ["eval", "runs/b", "--adapter", "runs/a"],
    "eval of a checkpoint": ["eval", "runs/b", "--adapter", "x=runs/a/checkpoints/step-00000004"],
    "inspect": ["adapter", "inspect", "runs/a"],
    "resize": ["adapter", "resize", "runs/a", "--rank", "2", "--out", "out"],
    "combine": ["adapter", "combine", "runs/b", "runs/a", "--out", "out"],
    "train from": ["train", "recipe.yaml", "--set", "adapter={from: runs/a}", "--set", "output=out"],
    "check from": ["check", "recipe.yaml", "--set", "adapter={from: runs/a}", "--set", "output=out"],
}


@pytest.fixture
def two_runs(trained_run: Path) -> Path:
    """The run runs/a, to be damaged, and its copy runs/b."""
    shutil.copytree(trained_run, "runs/b")
    return trained_run


def change_tensors(run: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights of the run's adapter and of its last checkpoint, as a tool would that leaves no checksums."""
    for folder in (run / "adapter", run / "checkpoints" / "step-00000004"):
        tensors = load_file(remove_checksums(folder) / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)


def overflow(tensors: dict[str, Tensor]) -> None:
    """Scale the tensors to finite values whose products are not."""
    for tensor in tensors.values():
        tensor.div_(tensor.abs().max()).mul_(3e37)


def write_other_base() -> str:
    """Write a random model with the config of the base."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained("base").config).save_pretrained("other")
    AutoTokenizer.from_pretrained("base").save_pretrained("other")
    return "other"


@pytest.mark.parametrize(
    ("command", "closed"),
    [
        ("chat runs/a", "runs/a/adapter"),
        ("adapter inspect runs/a/adapter", "runs/a/adapter"),
        ("export runs/a --to peft --out x", "runs/a/adapter"),
        ("merge runs/a --out x", "runs/a"),
        ("check recipe.yaml", "base"),
    ],
)
def test_a_folder_without_permission_is_told(
    command: str, closed: str, trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    """Root may read everything: the calls of the system answer as for another user."""
    access, lexists, isfile = os.access, os.path.lexists, os.path.isfile
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != closed and access(path, mode))
    for name, asked in (("lexists", lexists), ("isfile", isfile)):
        monkeypatch.setattr(
            os.path, name, lambda path, asked=asked: not str(path).startswith(f"{closed}/") and asked(path)
        )
    assert_refused(lora(*command.split()), f"{closed} cannot be read: Permission denied")


def assert_refused(result: CommandResult, message: str) -> None:
    assert (result.code, result.out) == (2, ""), result.err
    assert [line.partition(": ")[0] for line in result.last_two] == ["error", "hint"]
    assert re.search(message, result.last_two[0]), result.last_two[0]
    assert "measuring" not in result.err
    assert not [path for path in Path().iterdir() if path.name.startswith(("out.gguf", ".tmp"))]
    assert not Path("out/adapter").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_that_is_not_finite_is_refused_by_every_command(command: str, two_runs: Path, lora: Lora):
    change_tensors(two_runs, lambda tensors: tensors[min(tensors)].view(-1)[3:].fill_(float("nan")))
    name = min(load_file(two_runs / "adapter" / WEIGHTS))
    assert_refused(lora(*COMMANDS[command]), rf"{re.escape(name)} has \d+ of \d+ values that are not finite \(nan\)$")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_that_is_not_the_verified_one_is_refused_by_every_command(command: str, two_runs: Path, lora: Lora):
    """Two modules of the same shape are swapped: nothing but the checksums can tell."""
    for folder in (two_runs / "adapter", two_runs / "checkpoints" / "step-00000004"):
        tensors = load_file(folder / WEIGHTS)
        k, v = (f"base_model.model.model.layers.0.self_attn.{kind}_proj.lora_B.weight" for kind in "kv")
        tensors[k], tensors[v] = tensors[v], tensors[k]
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert_refused(lora(*COMMANDS[command]), rf" is not the adapter that was verified: {WEIGHTS} has other contents")


def test_the_text_of_the_model_card_may_be_changed(trained_run: Path, lora: Lora):
    (trained_run / "adapter" / "README.md").write_text("my text")
    result = lora("adapter", "inspect", trained_run)
    assert result.code == 0
    assert re.search(r"note: runs/a/adapter: README.md has 7 bytes, not [\d,]+ \(checksums.json\)", result.err)


def test_a_run_whose_adapter_lost_its_configuration_is_not_called_unfinished(trained_run: Path, lora: Lora):
    (trained_run / "adapter" / "adapter_config.json").unlink()
    assert_refused(lora("merge", trained_run, "--out", "out"), "runs/a/adapter has no adapter_config.json")


def test_chat_refuses_a_base_with_other_weights(two_runs: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    other = write_other_base()
    message = r"other \(fingerprint \w{12}\) is not the base that runs/a/adapter was trained on: base, Llama"
    assert_refused(lora("chat", two_runs, "--base", other), message)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    result = lora("chat", two_runs, "--base", other, "--other-base", "--max-new-tokens", "2")
    assert result.code == 0, result.err
    assert "note: the weights of other differ from those of base, which runs/a/adapter was trained on" in result.err
    record = json.loads(Path("runs/a/adapter/trained_on.json").read_text())
    remove_checksums(two_runs / "adapter")
    Path("runs/a/adapter/trained_on.json").write_text(json.dumps({**record, "fingerprint": "ab" * 32}))
    assert_refused(lora("chat", "runs/b", "--adapter", "runs/a"), r"base \(fingerprint \w{12}\) is not the base that")


def test_eval_refuses_a_base_with_other_weights_before_it_measures(two_runs: Path, lora: Lora, recipe: WriteRecipe):
    recipe({"model.path": write_other_base(), "output": "runs/none"})
    message = r"other \(fingerprint \w{12}\) is not the base that runs/a/adapter was trained on: base, Llama"
    assert_refused(lora("eval", "recipe.yaml", "--adapter", "runs/a"), message)
    result = lora("eval", "recipe.yaml", "--adapter", "runs/a", "--other-base")
    assert result.code == 0, result.err
    assert "note: the weights of other differ from those of base, which runs/a/adapter was trained on" in result.err
    shutil.rmtree("other")
    shutil.move("base", "original")
    shutil.copytree("original", "base")
    write_other_base()
    os.replace("other/model.safetensors", "base/model.safetensors")
    assert_refused(lora("eval", "runs/a"), r"^error: base \(fingerprint \w{12}\) is not the base")


def test_weights_that_overflow_are_not_measured(trained_run: Path, lora: Lora):
    change_tensors(trained_run, overflow)
    result = lora("eval", trained_run, "--json", "out.json")
    assert (result.code, result.out) == (1, "")
    assert re.match(
        r"error: adapter: the loss of \d+ of 2 rows is not finite, the first is rows.jsonl:\d+$", result.last_two[0]
    )
    assert not Path("out.json").exists()


def test_weights_that_overflow_do_not_chat(trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    change_tensors(trained_run, overflow)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/base\nhi\n"))
    result = lora("chat", trained_run, "--max-new-tokens", "2")
    assert result.code == 0
    assert result.err.splitlines()[-2].startswith("the model computes no numbers (NaN); its weights are damaged")


@pytest.mark.parametrize("weight", ["nan", "inf", "1e999", "two"])
def test_a_weight_of_a_combination_is_a_finite_number(weight: str, trained_run: Path, lora: Lora):
    result = lora("adapter", "combine", f"{weight}*runs/a", "runs/a", "--out", "out")
    assert_refused(result, f"{re.escape(weight)}.runs/a: {weight} is not a weight")


def test_a_combination_that_overflows_is_not_written(trained_run: Path, lora: Lora):
    result = lora("adapter", "combine", "1e300*runs/a", "runs/a", "--out", "out")
    assert_refused(result, "is too large for fp32")
    assert not Path("out").exists()


def test_a_negative_alpha_subtracts(trained_run: Path, lora: Lora):
    """PEFT accepts it; the update of the resized adapter has the sign of the original."""
    file = remove_checksums(trained_run / "adapter") / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "lora_alpha": -config["lora_alpha"]}))
    assert lora("adapter", "resize", trained_run, "--rank", "4", "--out", "small").code == 0
    original, small = load_file(trained_run / "adapter" / WEIGHTS), load_file(Path("small") / WEIGHTS)
    a = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    update = -2.0 * original[a.replace("lora_A", "lora_B")] @ original[a]
    assert torch.allclose(small[a.replace("lora_A", "lora_B")] @ small[a], update, atol=1e-6)


@pytest.fixture
def absolute_run(workdir: Path, recipe: WriteRecipe, lora: Lora) -> CommandResult:
    """The result of a training whose recipe has the absolute path of its base."""
    recipe({"model.path": str(workdir / "base"), "training.max_steps": 2, "data.eval": 0.1})
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    return result


def base_of(folder: str) -> Any:
    return json.loads(Path(folder, "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.slow
def test_no_path_of_the_machine_is_in_an_adapter_and_its_exports(
    absolute_run: CommandResult, workdir: Path, lora: Lora
):
    assert "note: adapter_config.json names the base by a local path, base; to publish it, give" in absolute_run.err
    assert base_of("runs/a/adapter") == base_of("runs/a/checkpoints/step-00000002") == "base"
    target = workdir / "runs" / "a"
    for number, to in enumerate(("peft", "vllm", "safetensors")):
        assert lora("export", target, "--to", to, "--out", workdir / f"out{number}").code == 0
    assert lora("merge", target, "--out", workdir / "out3").code == 0
    assert lora("export", target, "--to", "gguf", "--out", workdir / "out.gguf").code == 0
    assert lora("adapter", "resize", target, "--rank", "2", "--out", workdir / "out4").code == 0
    folders = ["runs/a/adapter", "runs/a/checkpoints", *(f"out{number}" for number in range(5))]
    # A checkpoint's state.json has the recipe, which a resumed run compares: it is not published.
    files = [p for folder in folders for p in Path(folder).rglob("*") if p.is_file() and p.name != "state.json"]
    for file in [*files, *Path().glob("out.*")]:
        assert str(workdir).encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_the_base_with_an_absolute_path_is_found_by_the_recipe_of_the_run(
    absolute_run: CommandResult, workdir: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    """Also from another folder, and after the run was moved; a copy of the adapter alone needs --base."""
    shutil.move("runs", "elsewhere")
    (workdir / "work").mkdir()
    monkeypatch.chdir(workdir / "work")
    assert lora("merge", "../elsewhere/a", "--out", "merged").code == 0
    assert lora("adapter", "inspect", "../elsewhere/a/checkpoints/step-00000002").code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert lora("chat", "../elsewhere/a", "--max-new-tokens", "2").code == 0
    shutil.copytree("../elsewhere/a/adapter", "copy")
    result = lora("merge", "copy", "--out", "merged2")
    assert_refused(result, r"^error: copy names its base base: base cannot be loaded")
    assert result.last_two[1].startswith("hint: name it with --base PATH; ")
    assert lora("merge", "copy", "--out", "merged2", "--base", "../base").code == 0
    assert Path("merged2/model.safetensors").read_bytes() == Path("merged/model.safetensors").read_bytes()


def cache_on_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the base into a cache of the hub as org/tiny."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = cache / "models--org--tiny"
    shutil.copytree("base", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for name in ("huggingface_hub.constants", "huggingface_hub._snapshot_download.constants"):
        monkeypatch.setattr(f"{name}.HF_HUB_CACHE", str(cache))


def test_an_exported_adapter_names_the_base_on_the_hub(
    trained_run: Path, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache_on_the_hub(tmp_path / "hub", monkeypatch)
    assert lora("export", trained_run, "--to", "peft", "--out", "local").code == 0
    assert base_of("local") == "base"
    result = lora("export", trained_run, "--to", "peft", "--base", "org/tiny", "--out", "published")
    assert result.code == 0, result.err
    assert base_of("published") == "org/tiny"
    assert "local path" not in result.err
    assert json.loads(Path("published/export.json").read_text())["source"]["base"] == "org/tiny"
    assert lora("merge", "published", "--out", "merged").code == 0


def test_chat_compares_the_weights_of_a_hub_model_once_they_are_loaded(
    trained_run: Path, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache_on_the_hub(tmp_path / "hub", monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert lora("chat", trained_run, "--base", "org/tiny").code == 0
    write_other_base()
    (weights,) = (tmp_path / "hub").rglob("model.safetensors")
    shutil.copy("other/model.safetensors", weights)
    assert_refused(lora("chat", trained_run, "--base", "org/tiny"), r"org/tiny \(fingerprint \w{12}\) is not the base")


@pytest.mark.parametrize("to", ["gguf", "gguf-adapter"])
def test_a_template_that_cannot_be_parsed_is_refused_before_anything_is_written(to: str, trained_run: Path, lora: Lora):
    (remove_checksums(trained_run / "adapter") / "chat_template.jinja").write_text("{% for message in")
    result = lora("export", trained_run, "--to", to, "--out", "out.gguf")
    assert_refused(result, "not valid Jinja")
    assert not list(Path().glob("out*"))
