"""`lora merge` and `--unmerge`: the written model, its verification, and refused merges, which leave no files."""

# ruff: noqa: E501 - messages are in one line, as in the terminal
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.merging import compare_models, stream
from lora_cli.merging.deltas import LowRankDelta
from lora_cli.merging.merge_tensors import MergedTensor, ReadWrite
from lora_cli.model import safetensors_io
from lora_cli.model.safetensors_io import TensorInfo
from tests.commands.conftest import Lora, WriteRecipe, remove_checksums

WEIGHTS = "runs/a/adapter/adapter_model.safetensors"


def scale_b(factor: float) -> None:
    """Multiply every B of the saved adapter by `factor`."""
    remove_checksums(Path(WEIGHTS).parent)
    tensors = load_file(WEIGHTS)
    save_file({name: t * factor if "lora_B" in name else t for name, t in tensors.items()}, WEIGHTS, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_plain_transformers_loads_the_merged_model_in_the_requested_dtype(dtype: str, trained_run: Path, lora: Lora):
    result = lora("merge", trained_run / "adapter", "--out", "merged", "--dtype", dtype)
    assert (result.code, result.out) == (0, "merged\n"), result.err
    name = "float32" if dtype == "auto" else dtype  # auto is the dtype of the base
    stored = load_file("merged/model.safetensors")
    assert {t.dtype for t in stored.values()} == {getattr(torch, name)}
    base = load_file("base/model.safetensors")
    assert stored.keys() == base.keys()
    adapted = {key for key in base if not torch.equal(stored[key], base[key].to(stored[key].dtype))}
    assert {key.split(".")[-2] for key in adapted} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained("merged")
    assert model.dtype == getattr(torch, name)
    assert AutoTokenizer.from_pretrained("merged").chat_template == AutoTokenizer.from_pretrained("base").chat_template
    verified = re.search(
        r"adapter on 2 held-out rows \(\d+ supervised tokens\): logits within ([\d.e+-]+), KL", result.err
    )
    assert verified is not None, result.err
    assert float(verified[1]) < (1e-5 if name == "float32" else 3e-2)  # in 16 bits, the base's weights are rounded too


def test_an_existing_folder_is_replaced_only_with_force(trained_run: Path, lora: Lora):
    assert lora("merge", trained_run / "adapter", "--out", "merged").code == 0
    first = Path("merged").stat().st_ino
    refused = lora("merge", trained_run / "adapter", "--out", "merged")
    assert refused.code == 2
    assert refused.last_two == [
        "error: --out merged exists",
        "hint: name another folder, or replace it with --force",
    ]
    assert Path("merged").stat().st_ino == first
    assert lora("merge", trained_run / "adapter", "--out", "merged", "--force").code == 0
    assert Path("merged").stat().st_ino != first
    Path("merged/mine.txt").write_text("mine")
    refused = lora("merge", trained_run / "adapter", "--out", "merged", "--force")
    assert refused.last_two[0] == "error: --out merged is not replaced: it contains mine.txt, which lora did not write"
    assert Path("merged/mine.txt").read_text() == "mine"


def test_the_base_is_not_replaced(trained_run: Path, lora: Lora):
    model = Path("base").resolve()
    Path("base").unlink()  # a link
    shutil.copytree(model, "base")
    result = lora("merge", "runs/a/adapter", "--out", "base", "--force")
    assert result.code == 2
    assert result.last_two == ["error: --out base is an input of the merge", "hint: name another folder"]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["runs/a", "--out", "runs/a", "--force"],
            ["error: --out runs/a contains runs/a/adapter, an input of the merge", "hint: name another folder"],
        ),
        (["runs", "--out", "x"], ["error: runs has no adapter_config.json", "hint: give a run of lora train, or an adapter folder"]),
        (["none", "--out", "x"], ["error: none does not exist", "hint: give a run of lora train, or an adapter folder"]),
        (["base", "--out", "x"], ["error: base is a model, not an adapter", "hint: give a run of lora train, or an adapter folder"]),
        (["runs/a/adapter", "--out", "no/x"], ["error: --out no/x: there is no folder no", "hint: make it first"]),
        (["runs/a/adapter", "--out", "x", "--dtype", "bf16"], ["error: --dtype bf16 is not known", "hint: write auto, bfloat16, float16 or float32"]),
        (["runs/a/adapter", "--out", "x", "--base", "./none"], ["error: --base: there is no folder ./none", None]),
    ],
)  # fmt: skip
def test_wrong_arguments_give_an_error_and_a_hint(
    arguments: list[str], lines: list[str | None], trained_run: Path, lora: Lora
):
    result = lora("merge", *arguments)
    assert (result.code, result.out) == (2, "")
    printed = [line for line, expected in zip(result.last_two, lines, strict=True) if expected]
    assert printed == [line for line in lines if line]
    assert not Path("x").exists()


def write_other_base(**changes: int) -> str:
    """Write a random model with the config of the base, except `changes`."""
    config = AutoModelForCausalLM.from_pretrained("base").config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained("other")
    AutoTokenizer.from_pretrained("base").save_pretrained("other")
    return "other"


def test_another_base_is_refused_by_its_fingerprint_and_by_its_shapes(trained_run: Path, lora: Lora):
    result = lora("merge", trained_run / "adapter", "--out", "x", "--base", write_other_base())
    assert result.code == 2
    assert re.fullmatch(
        r"error: other \(fingerprint \w{12}\) is not the base that runs/a/adapter was trained on: base, "
        r"LlamaForCausalLM \(fingerprint \w{12}\)",
        result.last_two[0],
    )
    assert result.last_two[1].endswith("if this is the same model in another form, add --other-base")
    again = lora("merge", trained_run / "adapter", "--out", "x", "--base", "other", "--other-base")
    assert again.code == 0, again.err
    assert "note: the weights of other differ from those of base, which runs/a/adapter was trained on" in again.err
    for change in ({"hidden_size": 96, "head_dim": 24}, {"num_hidden_layers": 1}):
        refused = lora(
            "merge", trained_run / "adapter", "--out", "y", "--base", write_other_base(**change), "--other-base"
        )
        assert refused.code == 2
        assert refused.last_two[0].startswith(f"error: {trained_run / 'adapter'} does not fit other: ")
    assert not Path("y").exists()


def test_an_update_lost_in_rounding_is_refused(trained_run: Path, lora: Lora):
    scale_b(1e-6)
    result = lora("merge", trained_run / "adapter", "--out", "x", "--dtype", "bfloat16")
    assert (result.code, result.out) == (1, "")
    assert re.fullmatch(r"error: \S+_proj\.weight: rounding to bfloat16 keeps -?\d+% of its update", result.last_two[0])
    assert result.last_two[1] == "hint: write a finer dtype: --dtype float32, or use the adapter unmerged"
    assert not Path("x").exists()
    assert not [entry for entry in Path().iterdir() if entry.name.startswith(".tmp")]


def test_an_untrained_adapter_is_refused(trained_run: Path, lora: Lora):
    scale_b(0.0)
    result = lora("merge", trained_run / "adapter", "--out", "x")
    assert result.code == 2
    assert result.last_two == ["error: the adapter changes no weight: it was never trained", "hint: train it first"]


SCALED_WEIGHT = "model.layers.0.mlp.down_proj.weight"


def skip_the_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make W + ΔW return W for all layers of one shape."""
    add = torch.add

    def return_w(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(a) if a.shape == (64, 128) else add(a, b, out=out)

    monkeypatch.setattr(torch, "add", return_w)


def scale_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the update of one layer by 0.001 before it is added."""
    merge_low_rank = ReadWrite.merge_low_rank

    def scale_and_merge(
        self: ReadWrite, name: str, delta: LowRankDelta, *tensors: TensorInfo, **options: int
    ) -> list[MergedTensor]:
        delta = LowRankDelta(delta.left * 1e-3, delta.right) if name == SCALED_WEIGHT else delta
        return merge_low_rank(self, name, delta, *tensors, **options)

    monkeypatch.setattr(ReadWrite, "merge_low_rank", scale_and_merge)


@pytest.mark.parametrize(
    ("fault", "verify", "message"),
    [
        (skip_the_addition, "tensors", "rounding to float32 keeps 0% of its update"),
        (skip_the_addition, "logits", "rounding to float32 keeps 0% of its update"),
        (scale_one_update, "tensors", "times what rounding explains"),
        (scale_one_update, "logits", "times what rounding explains"),
    ],
)
def test_a_wrong_update_is_detected(
    fault: Callable[[pytest.MonkeyPatch], None],
    verify: str,
    message: str,
    trained_run: Path,
    lora: Lora,
    monkeypatch: pytest.MonkeyPatch,
):
    fault(monkeypatch)
    result = lora("merge", trained_run / "adapter", "--out", "x", "--verify", verify)
    assert (result.code, result.out) == (1, "")
    assert ".mlp.down_proj.weight" in result.last_two[0]
    assert message in result.last_two[0]
    assert not Path("x").exists()


def test_a_written_tensor_that_reads_back_differently_is_detected(
    trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    write_merged = stream.write_merged

    def write_and_damage(plan: stream.MergePlan, folder: Path, **options: Any) -> list[MergedTensor]:
        merged = write_merged(plan, folder, **options)
        info = safetensors_io.list_tensors(folder)["lm_head.weight"]
        with info.file.open("r+b") as file:
            file.seek(info.begin + 64)
            file.write(b"\x00\x00\x40\x41")
        return merged

    monkeypatch.setattr(stream, "write_merged", write_and_damage)
    result = lora("merge", trained_run / "adapter", "--out", "x")
    assert (result.code, result.out) == (1, "")
    assert "the merged model is wrong: lm_head.weight, read back, differs" in result.last_two[0]
    assert not Path("x").exists()


def test_a_moved_adapter_is_merged(trained_run: Path, lora: Lora):
    shutil.move(trained_run / "adapter", "elsewhere")
    config = json.loads(Path("elsewhere/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert lora("merge", "elsewhere", "--out", "merged").code == 0


def test_random_probes_contain_the_trained_tokens():
    batch = compare_models.random_probes(
        "causal-lm", tokens=48, vocabulary=50, pad_id=0, start_id=None, end_id=7, include=[48, 49]
    )
    assert batch.input_ids[-1, :2].tolist() == [48, 49]
    assert batch.input_ids.numel() == 48
    rows = zip(batch.input_ids, batch.lengths, strict=True)
    assert all(row[length - 1] == 7 and not row[length:].any() for row, length in rows)


def kl_divergence(text: str, name: str) -> float:
    """Return the KL divergence in nats that `text` reports for the weights `name`."""
    match = re.search(rf"{name} KL ([\d.e+-]+) nats", text)
    assert match, text
    return float(match[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "loftq"])
def test_merging_a_qlora_adapter_chooses_the_weights_closer_to_the_trained_model(
    method: str, recipe: WriteRecipe, lora: Lora
):
    """LoftQ compensates for the 4-bit rounding of the base, and so does each QLoRA that was trained long enough."""
    changes = {"quantization": {"bits": 4, "compute_dtype": "float32"}, "adapter.method": method, "adapter.rank": 16}
    recipe(changes)
    assert lora("train", "recipe.yaml").code == 0
    trained_on = json.loads(Path("runs/a/adapter/trained_on.json").read_text())
    assert trained_on["quantization"]["type"] == "nf4"
    result = lora("merge", "runs/a/adapter", "--out", "auto")
    assert result.code == 0, result.err
    assert "weights: dequantized, closer to the trained 4-bit model on 2 held-out rows" in result.err
    assert kl_divergence(result.err, "dequantized") < 1e-6 < 0.1 * kl_divergence(result.err, "original")
    assert lora("merge", "runs/a/adapter", "--out", "dequantized", "--weights", "dequantized").code == 0
    assert lora("merge", "runs/a/adapter", "--out", "original", "--weights", "original").code == 0
    auto, dequantized, original, base = (
        load_file(f"{name}/model.safetensors") for name in ("auto", "dequantized", "original", "base")
    )
    assert all(torch.equal(auto[name], dequantized[name]) for name in base)
    changed = [name for name in base if not torch.equal(original[name], dequantized[name])]
    assert {name.split(".")[-2] for name in changed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_dequantized_weights_of_an_unquantized_base_are_refused(trained_run: Path, lora: Lora):
    assert lora("merge", trained_run / "adapter", "--out", "x", "--weights", "dequantized").last_two == [
        "error: --weights dequantized: runs/a/adapter has no record that its base was quantized in training",
        "hint: leave --weights out: the adapter was trained on the base's weights",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmerge_restores_the_base(dtype: str, trained_run: Path, lora: Lora):
    """Each restored weight differs from the base by at most one rounding unit."""
    if dtype == "bfloat16":
        tensors = load_file("base/model.safetensors")
        shutil.copytree("base", "bf16")
        save_file({name: t.bfloat16() for name, t in tensors.items()}, "bf16/model.safetensors", {"format": "pt"})
        file = remove_checksums(trained_run / "adapter") / "adapter_config.json"
        file.write_text(file.read_text().replace('"base"', '"bf16"'))
        (trained_run / "adapter" / "trained_on.json").unlink()
    merged = lora("merge", trained_run / "adapter", "--out", "merged")
    assert merged.code == 0, merged.err
    result = lora("merge", trained_run / "adapter", "--base", "merged", "--out", "restored", "--unmerge")
    assert (result.code, result.out) == (0, "restored\n"), result.err
    comparison = re.search(
        r"compared with (\w+): ([\d.]+)% of the weights are equal, the others within ([\d.]+) units", result.err
    )
    assert comparison is not None, result.err
    assert comparison[1] == ("base" if dtype == "float32" else "bf16")
    assert float(comparison[2]) > 50
    assert float(comparison[3]) <= 1.01
    restored, base = load_file("restored/model.safetensors"), load_file(f"{comparison[1]}/model.safetensors")
    merged_tensors = load_file("merged/model.safetensors")
    for name in base:
        unit = torch.finfo(base[name].dtype).eps * torch.maximum(base[name].abs(), merged_tensors[name].abs()).float()
        assert ((restored[name] - base[name]).abs() <= unit + 1e-30).all(), name


def test_unmerge_of_dora_is_refused(recipe: WriteRecipe, lora: Lora):
    recipe({"adapter.method": "dora"})
    assert lora("train", "recipe.yaml").code == 0
    assert lora("merge", "runs/a/adapter", "--out", "merged").code == 0
    assert lora("merge", "runs/a/adapter", "--out", "x", "--unmerge").last_two == [
        "error: --unmerge: the merged model is missing",
        "hint: name its folder: --base MERGED",
    ]
    refused = lora("merge", "runs/a/adapter", "--base", "merged", "--out", "x", "--unmerge")
    assert refused.last_two == [
        "error: --unmerge: lora did more than add to model.layers.0.self_attn.q_proj and 13 more, and the "
        "original values are lost",
        "hint: use the original base",
    ]


def test_a_tokenizer_of_another_model_is_refused(trained_run: Path, lora: Lora):
    file = remove_checksums(trained_run / "adapter") / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tree))
    result = lora("merge", trained_run / "adapter", "--out", "x")
    assert result.code == 2
    assert result.last_two[0].startswith("error: runs/a/adapter: its tokenizer does not fit base: ")


def test_a_tokenizer_with_more_tokens_than_embeddings_does_not_resize_the_model(trained_run: Path, lora: Lora):
    tokenizer = AutoTokenizer.from_pretrained(remove_checksums(trained_run / "adapter"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(trained_run / "adapter")
    assert lora("merge", trained_run / "adapter", "--out", "merged").code == 0
    assert AutoModelForCausalLM.from_pretrained("merged").config.vocab_size == len(tokenizer) - 1


def test_a_hub_base_is_loaded_from_the_cache(
    trained_run: Path, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its id and commit are those that the adapter was trained on; the folder has the layout of huggingface_hub."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree("base", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = remove_checksums(trained_run / "adapter") / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": "org/tiny", "revision": None}
    file.write_text(json.dumps(config))
    result = lora("merge", trained_run / "adapter", "--out", "merged", "--verify", "tensors")
    assert result.code == 0, result.err
    assert "merging lora into org/tiny" in result.err
    assert lora("merge", trained_run / "adapter", "--out", "expected", "--base", "base").code == 0
    merged, expected = load_file("merged/model.safetensors"), load_file("expected/model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
