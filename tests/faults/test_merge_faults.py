"""A merge that is killed, runs out of disk, or has half a base leaves nothing in the model's place."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.commands.conftest import LORA_ON_ONE_CORE, Lora
from tests.faults.test_disk import no_file_above
from tests.support.peak_memory import peak_memory_of

SPARE = 64 << 20  # bytes that a merge may hold beyond the libraries, whatever the model


def hidden() -> list[str]:
    return [entry.name for entry in Path().iterdir() if entry.name.startswith(".tmp")]


def test_killed_on_the_way(trained: Path, lora: Lora):
    command = [*LORA_ON_ONE_CORE, "merge", str(trained / "adapter"), "--out", "merged"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not hidden() and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert not Path("merged").exists()
    assert hidden(), "what was being written lies beside, under a name that nobody takes for a model"
    done = lora("merge", trained / "adapter", "--out", "merged")
    assert done.code == 0, done.err
    assert hidden() == []


def test_interrupted_by_the_user(trained: Path):
    command = [*LORA_ON_ONE_CORE, "merge", str(trained / "adapter"), "--out", "merged"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not hidden() and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate()
    assert run.returncode == 130, said
    assert "Traceback" not in said
    assert not Path("merged").exists()
    assert hidden() == []


def test_a_full_disk(trained: Path, lora: Lora):
    with no_file_above(100_000):
        done = lora("merge", trained / "adapter", "--out", "merged")
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert done.last_two[0].endswith("File too large")
    assert not Path("merged").exists()
    assert hidden() == []


def test_a_disk_that_has_too_little_room(trained: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch):
    from lora_cli.merging import stream

    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: Usage())
    done = lora("merge", trained / "adapter", "--out", "merged")
    assert done.code == 1
    assert re.fullmatch(r"error: .*: the model needs [\d.]+ GB, and 0\.0 GB are free", done.last_two[0])
    assert hidden() == []


class Usage:
    free = 1000


def in_shards() -> None:
    """The base of the run, in several files under the name that the adapter knows."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
    Path("base").unlink()
    model.save_pretrained("base", max_shard_size="60KB")
    tokenizer.save_pretrained("base")
    Path("runs/a/adapter/trained_on.json").unlink()


def test_a_shard_that_is_missing(trained: Path, lora: Lora):
    in_shards()
    name = sorted(Path("base").glob("*.safetensors"))[1].name
    (Path("base") / name).unlink()
    done = lora("merge", trained / "adapter", "--out", "merged")
    assert done.code == 2
    assert re.fullmatch(rf"error: base: shard {name} is missing; the index lists \d+ shards", done.last_two[0])
    assert not Path("merged").exists()


@pytest.mark.parametrize("left", [0.9, 0.0])
def test_a_shard_that_is_cut_short(left: float, trained: Path, lora: Lora):
    in_shards()
    file = sorted(Path("base").glob("*.safetensors"))[1]
    os.truncate(file, int(file.stat().st_size * left))
    done = lora("merge", trained / "adapter", "--out", "merged")
    assert done.code == 2
    assert done.last_two[0].startswith(f"error: {file}: truncated")
    assert not Path("merged").exists()


def test_an_index_that_tells_of_a_tensor_that_is_not_there(trained: Path, lora: Lora):
    in_shards()
    index = json.loads(Path("base/model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    done = lora("merge", trained / "adapter", "--out", "merged")
    assert done.last_two[0].startswith("error: base: model.layers.7.mlp.up_proj.weight is not in any shard")


def test_memory_does_not_grow_with_the_model(trained: Path, tmp_path: Path):
    """A model of 150 MB in bf16 takes little more than one of 400 KB; in fp32 and twice it would take 600."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained("large")
    AutoTokenizer.from_pretrained("base").save_pretrained("large")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02
    adapted.peft_config["default"].base_model_name_or_path = "large"
    adapted.save_pretrained("of-large")
    size = Path("large/model.safetensors").stat().st_size
    assert size > 2 * SPARE
    peaks = [
        peak_memory_of("merge", folder, "--out", f"m{n}", "--verify", "tensors")
        for n, folder in enumerate([trained / "adapter", "of-large"])
    ]
    assert peaks[1] - peaks[0] < SPARE
