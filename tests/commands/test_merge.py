"""`lora merge`: what it writes and proves, and what it refuses, with nothing half-written left."""

# ruff: noqa: E501 - a line of the terminal is a line here
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lora_cli.merging import parity
from tests.commands.conftest import Lora

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
    verified = re.search(r"logits within ([\d.e+-]+) in fp32 and ([\d.e+-]+) in (\w+)", done.err)
    assert verified is not None
    assert float(verified[1]) < 1e-5
    assert verified[3] == name


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
        (["runs/a/adapter", "--out", "base"], ["error: --out base: that is what is merged", "hint: name another folder"]),
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


def test_another_base_is_refused(trained: Path, lora: Lora):
    other = AutoModelForCausalLM.from_pretrained("base").config
    other.hidden_size, other.head_dim = 96, 24
    AutoModelForCausalLM.from_config(other).save_pretrained("wide")
    AutoTokenizer.from_pretrained("base").save_pretrained("wide")
    done = lora("merge", trained / "adapter", "--out", "x", "--base", "wide")
    assert done.code == 2
    assert done.last_two[0].startswith(f"error: {trained / 'adapter'} does not fit wide: ")
    assert not Path("x").exists()


def test_an_adapter_that_rounding_takes_away_is_refused(trained: Path, lora: Lora):
    rewrite(1e-6)
    done = lora("merge", trained / "adapter", "--out", "x", "--dtype", "bfloat16")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(
        r"error: \S+_proj\.weight: of its update -?\d+% survives the rounding to bfloat16", done.last_two[0]
    )
    assert done.last_two[1] == "hint: write a finer dtype: --dtype float32, or use the adapter as it is"
    assert not Path("x").exists()
    assert not [entry for entry in Path().iterdir() if entry.name.startswith(".tmp")]


def test_an_adapter_that_was_never_trained_is_refused(trained: Path, lora: Lora):
    rewrite(0.0)
    done = lora("merge", trained / "adapter", "--out", "x")
    assert done.code == 2
    assert done.last_two == ["error: the adapter changes no weight: it was never trained", "hint: train it first"]


def test_a_merge_that_loses_a_tensor_fails(trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    """One layer's update is undone behind the fold's back: the logits tell."""
    unload = BaseTuner.merge_and_unload

    def forgetful(self: BaseTuner) -> torch.nn.Module:
        layer = self.model.model.layers[0].mlp.down_proj
        layer.unmerge()
        layer.merged_adapters.append("default")  # as if it had been folded in
        return unload(self)

    monkeypatch.setattr(BaseTuner, "merge_and_unload", forgetful)
    done = lora("merge", trained / "adapter", "--out", "x")
    assert (done.code, done.out) == (1, "")
    assert done.last_two[0].startswith(
        "error: the merged model is another one: its logits differ from base and adapter"
    )
    assert not Path("x").exists()


def test_a_copy_that_reads_back_otherwise_fails(trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    save = PreTrainedModel.save_pretrained

    def damaged(self: PreTrainedModel, folder: str, **options: object) -> None:
        save(self, folder, **options)
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"][5] += 1.0
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    done = lora("merge", trained / "adapter", "--out", "x")
    assert (done.code, done.out) == (1, "")
    assert done.last_two[0].startswith("error: the merged model reads back as another one: its logits differ by")
    assert not Path("x").exists()


def test_the_adapter_may_be_anywhere(trained: Path, lora: Lora):
    shutil.move(trained / "adapter", "elsewhere")
    config = json.loads(Path("elsewhere/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert lora("merge", "elsewhere", "--out", "merged").code == 0


def test_probes_hold_the_trained_tokens():
    batches = parity.probes("causal-lm", vocabulary=50, pad_id=0, start_id=None, end_id=7, include=[48, 49])
    assert batches[-1].input_ids[0, :2].tolist() == [48, 49]
    assert all(batch.input_ids[0, -1] == 7 for batch in batches)
