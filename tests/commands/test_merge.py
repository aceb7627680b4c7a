"""`lora merge`: what it writes and proves, and what it refuses, with nothing half-written left."""

# ruff: noqa: E501 - a line of the terminal is a line here
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
from tests.commands.conftest import Lora, WriteRecipe

WEIGHTS = "runs/a/adapter/adapter_model.safetensors"


def rewrite(change: float) -> None:
    """Multiply the adapter's B by `change`."""
    tensors = load_file(WEIGHTS)
    save_file({name: t * change if "lora_B" in name else t for name, t in tensors.items()}, WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_it_writes_a_model_of_the_dtype_that_plain_transformers_loads(dtype: str, trained: Path, lora: Lora):
    done = lora("merge", trained / "adapter", "--out", "merged", "--dtype", dtype)
    assert (done.code, done.out) == (0, "merged\n"), done.err
    name = "float32" if dtype == "auto" else dtype  # the base's
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
        r"adapter on 2 held-out rows \(\d+ supervised tokens\): logits within ([\d.e+-]+), KL", done.err
    )
    assert verified is not None, done.err
    assert float(verified[1]) < (1e-5 if name == "float32" else 3e-2)  # the base is rounded too


def test_what_is_there_is_kept_unless_forced(trained: Path, lora: Lora):
    Path("merged").mkdir()
    Path("merged/mine.txt").write_text("mine")
    refused = lora("merge", trained / "adapter", "--out", "merged")
    assert refused.code == 2
    assert refused.last_two == [
        "error: --out merged exists",
        "hint: name another folder, or replace it with --force",
    ]
    assert Path("merged/mine.txt").exists()
    assert lora("merge", trained / "adapter", "--out", "merged", "--force").code == 0
    assert not Path("merged/mine.txt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/a/adapter", "--out", "base"], ["error: --out base is an input of the merge", "hint: name another folder"]),
        (["runs/a", "--out", "x"], ["error: runs/a has no adapter_config.json", "hint: did you mean runs/a/adapter?"]),
        (["base", "--out", "x"], ["error: base has no adapter_config.json", "hint: give the adapter folder of a run: runs/NAME/adapter"]),
        (["runs/a/adapter", "--out", "no/x"], ["error: --out no/x: there is no folder no", "hint: make it first"]),
        (["runs/a/adapter", "--out", "x", "--dtype", "bf16"], ["error: --dtype bf16 is not known", "hint: write auto, bfloat16, float16 or float32"]),
        (["runs/a/adapter", "--out", "x", "--base", "./none"], ["error: model.path: there is no folder ./none", None]),
    ],
)  # fmt: skip
def test_mistakes_are_two_lines(words: list[str], said: list[str | None], trained: Path, lora: Lora):
    done = lora("merge", *words)
    assert (done.code, done.out) == (2, "")
    assert [line for line, wanted in zip(done.last_two, said, strict=True) if wanted] == [s for s in said if s]
    assert not Path("x").exists()


def other_base(**changes: int) -> str:
    config = AutoModelForCausalLM.from_pretrained("base").config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained("other")
    AutoTokenizer.from_pretrained("base").save_pretrained("other")
    return "other"


def test_another_base_is_refused_by_its_fingerprint_and_by_its_shapes(trained: Path, lora: Lora):
    done = lora("merge", trained / "adapter", "--out", "x", "--base", other_base())
    assert done.code == 2
    assert re.fullmatch(
        r"error: other \(fingerprint \w{12}\) is not the base that runs/a/adapter was trained on: base, "
        r"LlamaForCausalLM \(fingerprint \w{12}\)",
        done.last_two[0],
    )
    assert done.last_two[1].endswith("if this one is the same model in another form, add --other-base")
    again = lora("merge", trained / "adapter", "--out", "x", "--base", "other", "--other-base")
    assert again.code == 0, again.err
    assert "note: the weights of other differ from those of base, which this adapter was trained on" in again.err
    for change in ({"hidden_size": 96, "head_dim": 24}, {"num_hidden_layers": 1}):
        refused = lora("merge", trained / "adapter", "--out", "y", "--base", other_base(**change), "--other-base")
        assert refused.code == 2
        assert refused.last_two[0].startswith(f"error: {trained / 'adapter'} does not fit other: ")
    assert not Path("y").exists()


def test_an_adapter_that_rounding_takes_away_is_refused(trained: Path, lora: Lora):
    rewrite(1e-6)
    done = lora("merge", trained / "adapter", "--out", "x", "--dtype", "bfloat16")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(r"error: \S+_proj\.weight: rounding to bfloat16 keeps -?\d+% of its update", done.last_two[0])
    assert done.last_two[1] == "hint: write a finer dtype: --dtype float32, or use the adapter unmerged"
    assert not Path("x").exists()
    assert not [entry for entry in Path().iterdir() if entry.name.startswith(".tmp")]


def test_an_adapter_that_was_never_trained_is_refused(trained: Path, lora: Lora):
    rewrite(0.0)
    done = lora("merge", trained / "adapter", "--out", "x")
    assert done.code == 2
    assert done.last_two == ["error: the adapter changes no weight: it was never trained", "hint: train it first"]


LOST = "model.layers.0.mlp.down_proj.weight"


def skip_the_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    """W + ΔW comes out as W, in all layers of one shape."""
    add = torch.add

    def lost(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(a) if a.shape == (64, 128) else add(a, b, out=out)

    monkeypatch.setattr(torch, "add", lost)


def fold_another_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer gets next to nothing of its update, before anything is measured."""
    fold = ReadWrite.merge_low_rank

    def forgetful(
        self: ReadWrite, name: str, low: LowRankDelta, *places: TensorInfo, **options: int
    ) -> list[MergedTensor]:
        low = LowRankDelta(low.left * 1e-3, low.right) if name == LOST else low
        return fold(self, name, low, *places, **options)

    monkeypatch.setattr(ReadWrite, "merge_low_rank", forgetful)


@pytest.mark.parametrize(
    ("fault", "verify", "said"),
    [
        (skip_the_addition, "tensors", "rounding to float32 keeps 0% of its update"),
        (skip_the_addition, "logits", "rounding to float32 keeps 0% of its update"),
        (fold_another_update, "logits", "times what rounding explains"),
    ],
)
def test_a_delta_that_is_lost_on_the_way_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    verify: str,
    said: str,
    trained: Path,
    lora: Lora,
    monkeypatch: pytest.MonkeyPatch,
):
    fault(monkeypatch)
    done = lora("merge", trained / "adapter", "--out", "x", "--verify", verify)
    assert (done.code, done.out) == (1, "")
    assert ".mlp.down_proj.weight" in done.last_two[0]
    assert said in done.last_two[0]
    assert not Path("x").exists()


def test_what_reads_back_otherwise_is_found(trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    write = stream.write_merged

    def damaging(plan: stream.MergePlan, folder: Path, **options: Any) -> list[MergedTensor]:
        folded = write(plan, folder, **options)
        place = safetensors_io.list_tensors(folder)["lm_head.weight"]
        with place.file.open("r+b") as file:
            file.seek(place.begin + 64)
            file.write(b"\x00\x00\x40\x41")
        return folded

    monkeypatch.setattr(stream, "write_merged", damaging)
    done = lora("merge", trained / "adapter", "--out", "x")
    assert (done.code, done.out) == (1, "")
    assert "the merged model is wrong: lm_head.weight, read back, differs" in done.last_two[0]
    assert not Path("x").exists()


def test_the_adapter_may_be_anywhere(trained: Path, lora: Lora):
    shutil.move(trained / "adapter", "elsewhere")
    config = json.loads(Path("elsewhere/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert lora("merge", "elsewhere", "--out", "merged").code == 0


def test_probes_hold_the_trained_tokens():
    batches = compare_models.random_probes(
        "causal-lm", vocabulary=50, pad_id=0, start_id=None, end_id=7, include=[48, 49]
    )
    assert batches[-1].input_ids[0, :2].tolist() == [48, 49]
    assert all(batch.input_ids[0, -1] == 7 for batch in batches)


def kl(text: str, name: str) -> float:
    found = re.search(rf"{name} KL ([\d.e+-]+) nats", text)
    assert found, text
    return float(found[1])


@pytest.mark.parametrize("method", ["lora", "loftq"])
def test_over_a_quantised_base_the_nearer_weights_are_taken(method: str, recipe: WriteRecipe, lora: Lora):
    """What 4 bits did to the base is in the update of LoftQ, and in that of every QLoRA that was trained enough."""
    changes = {"quantization": {"bits": 4, "compute_dtype": "float32"}, "adapter.method": method, "adapter.rank": 16}
    recipe(changes)
    assert lora("train", "recipe.yaml").code == 0
    origin = json.loads(Path("runs/a/adapter/trained_on.json").read_text())
    assert origin["quantization"]["type"] == "nf4"
    done = lora("merge", "runs/a/adapter", "--out", "auto")
    assert done.code == 0, done.err
    assert "weights: dequantized, closer to the trained 4-bit model on 2 held-out rows" in done.err
    assert kl(done.err, "dequantized") < 1e-6 < 0.1 * kl(done.err, "original")
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


def test_weights_of_a_base_that_was_not_quantised(trained: Path, lora: Lora):
    assert lora("merge", trained / "adapter", "--out", "x", "--weights", "dequantized").last_two == [
        "error: --weights dequantized: runs/a/adapter has no record that its base was quantized in training",
        "hint: leave --weights out: the adapter was trained on the base's weights",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_merged_is_taken_out_again(dtype: str, trained: Path, lora: Lora):
    """Subtracting lands within a rounding of each weight."""
    if dtype == "bfloat16":
        tensors = load_file("base/model.safetensors")
        shutil.copytree("base", "half")
        save_file({name: t.bfloat16() for name, t in tensors.items()}, "half/model.safetensors", {"format": "pt"})
        for file in (trained / "adapter" / "adapter_config.json",):
            file.write_text(file.read_text().replace('"base"', '"half"'))
        (trained / "adapter" / "trained_on.json").unlink()
    merged = lora("merge", trained / "adapter", "--out", "merged")
    assert merged.code == 0, merged.err
    done = lora("merge", trained / "adapter", "--base", "merged", "--out", "again", "--unmerge")
    assert (done.code, done.out) == (0, "again\n"), done.err
    landed = re.search(
        r"compared with (\w+): ([\d.]+)% of the weights are equal, the others within ([\d.]+) units", done.err
    )
    assert landed is not None, done.err
    assert landed[1] == ("base" if dtype == "float32" else "half")
    assert float(landed[2]) > 50
    assert float(landed[3]) <= 1.01
    again, base = load_file("again/model.safetensors"), load_file(f"{landed[1]}/model.safetensors")
    merged_tensors = load_file("merged/model.safetensors")
    for name in base:
        unit = torch.finfo(base[name].dtype).eps * torch.maximum(base[name].abs(), merged_tensors[name].abs()).float()
        assert ((again[name] - base[name]).abs() <= unit + 1e-30).all(), name


def test_what_cannot_be_taken_out_is_refused(recipe: WriteRecipe, lora: Lora):
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


def test_a_tokenizer_of_another_model_is_refused(trained: Path, lora: Lora):
    file = trained / "adapter" / "tokenizer.json"
    tree = json.loads(file.read_text())
    words = tree["model"]["vocab"]
    first, second = list(words)[40:42]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(tree))
    done = lora("merge", trained / "adapter", "--out", "x")
    assert done.code == 2
    assert done.last_two[0].startswith("error: runs/a/adapter: its tokenizer does not fit base: ")


def test_a_tokenizer_that_knows_more_than_the_base_has_embeddings_for_makes_no_new_ones(trained: Path, lora: Lora):
    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(trained / "adapter")
    assert lora("merge", trained / "adapter", "--out", "merged").code == 0
    assert AutoModelForCausalLM.from_pretrained("merged").config.vocab_size == len(tokenizer) - 1


def test_a_base_of_the_hub_is_taken_from_the_cache(
    trained: Path, lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By its id and the commit that the adapter was trained on; the folder is laid out as huggingface_hub has it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree("base", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = trained / "adapter" / "adapter_config.json"
    config = {**json.loads(file.read_text()), "base_model_name_or_path": "org/tiny", "revision": None}
    file.write_text(json.dumps(config))
    done = lora("merge", trained / "adapter", "--out", "merged", "--verify", "tensors")
    assert done.code == 0, done.err
    assert "merging lora into org/tiny" in done.err
    assert lora("merge", trained / "adapter", "--out", "again", "--base", "base").code == 0
    merged, again = load_file("merged/model.safetensors"), load_file("again/model.safetensors")
    assert all(torch.equal(merged[name], again[name]) for name in again)
