"""A merge that is killed, fills the disk, or reads an incomplete base leaves no output."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_cli.run import disk_space
from tests.commands.conftest import LORA_ON_ONE_CORE, Lora, remove_checksums
from tests.faults.test_disk import limit_file_size
from tests.support.peak_memory import peak_memory_of

pytestmark = pytest.mark.slow

MEMORY_LIMIT = 64 << 20  # bytes that a merge may use in addition to the libraries, for any model
PROOF_LIMIT = 2 * MEMORY_LIMIT  # and with its proof


def temporary_files() -> list[str]:
    return [entry.name for entry in Path().iterdir() if entry.name.startswith(".tmp")]


def test_sigkill_leaves_no_output_and_the_next_merge_cleans_up(trained_run: Path, lora: Lora):
    command = [*LORA_ON_ONE_CORE, "merge", str(trained_run / "adapter"), "--out", "merged"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not temporary_files() and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    assert not Path("merged").exists()
    assert temporary_files(), "the incomplete output stays under a temporary name"
    result = lora("merge", trained_run / "adapter", "--out", "merged")
    assert result.code == 0, result.err
    assert temporary_files() == []


def test_sigint_leaves_no_output(trained_run: Path):
    command = [*LORA_ON_ONE_CORE, "merge", str(trained_run / "adapter"), "--out", "merged"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not temporary_files() and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGINT)
        _, stderr = run.communicate()
    assert run.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not Path("merged").exists()
    assert temporary_files() == []


def test_a_full_disk_leaves_no_output(trained_run: Path, lora: Lora):
    with limit_file_size(100_000):
        result = lora("merge", trained_run / "adapter", "--out", "merged")
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert result.last_two[0].endswith("File too large")
    assert not Path("merged").exists()
    assert temporary_files() == []


def test_too_little_free_disk_space_is_refused_before_writing(
    trained_run: Path, lora: Lora, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, free=1000))
    result = lora("merge", trained_run / "adapter", "--out", "merged")
    assert result.code == 1
    size = Path("base/model.safetensors").stat().st_size
    found = re.fullmatch(
        r"error: merged: \d+ KiB \(([\d,]+) bytes\) are needed for the merged model, "
        r"and 1 KiB \(1,000 bytes\) are free",
        result.last_two[0],
    )
    assert found, result.err
    assert 0.9 < int(found[1].replace(",", "")) / size <= 1
    assert temporary_files() == []


def shard_base() -> None:
    """Replace the base of the run by the same model in several shards."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained("base"), AutoTokenizer.from_pretrained("base")
    Path("base").unlink()
    model.save_pretrained("base", max_shard_size="60KB")
    tokenizer.save_pretrained("base")
    (remove_checksums(Path("runs/a/adapter")) / "trained_on.json").unlink()


def test_a_missing_shard_is_refused(trained_run: Path, lora: Lora):
    shard_base()
    name = sorted(Path("base").glob("*.safetensors"))[1].name
    (Path("base") / name).unlink()
    result = lora("merge", trained_run / "adapter", "--out", "merged")
    assert result.code == 2
    assert re.fullmatch(rf"error: base: shard {name} is missing; the index lists \d+ shards", result.last_two[0])
    assert not Path("merged").exists()


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_a_truncated_shard_is_refused(share: float, trained_run: Path, lora: Lora):
    shard_base()
    file = sorted(Path("base").glob("*.safetensors"))[1]
    os.truncate(file, int(file.stat().st_size * share))
    result = lora("merge", trained_run / "adapter", "--out", "merged")
    assert result.code == 2
    assert result.last_two[0].startswith(f"error: {file}: truncated")
    assert not Path("merged").exists()


def test_an_index_with_a_tensor_that_no_shard_contains_is_refused(trained_run: Path, lora: Lora):
    shard_base()
    index = json.loads(Path("base/model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = next(iter(index["weight_map"].values()))
    Path("base/model.safetensors.index.json").write_text(json.dumps(index))
    result = lora("merge", trained_run / "adapter", "--out", "merged")
    assert result.last_two[0].startswith("error: base: model.layers.7.mlp.up_proj.weight is not in any shard")


def test_memory_does_not_grow_with_the_model(trained_run: Path, tmp_path: Path):
    """A model of 290 MB in bf16 needs little more memory than one of 400 KB; two copies in fp32 would need 1.2 GB."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=13, num_attention_heads=8,
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
    adapted.save_pretrained("adapter-of-large")
    size = Path("large/model.safetensors").stat().st_size
    assert size > 2 * PROOF_LIMIT
    small, large = peak_memory_of(
        ["merge", trained_run / "adapter", "--out", "small-merged"],
        ["merge", "adapter-of-large", "--out", "large-merged"],
    )
    assert large - small < PROOF_LIMIT
