"""An export that is killed or fills the disk leaves no output; the next export removes its temporary files."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.commands.conftest import LORA_ON_ONE_CORE, Lora
from tests.faults.test_disk import limit_file_size
from tests.faults.test_merge_faults import MEMORY_LIMIT, temporary_files
from tests.support.peak_memory import peak_memory_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_signal_leaves_no_output_and_the_next_export_cleans_up(number: signal.Signals, trained_run: Path, lora: Lora):
    command = [*LORA_ON_ONE_CORE, "export", str(trained_run), "--to", "gguf", "--out", "a.gguf"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not any("a.gguf" in name for name in temporary_files()) and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(number)
        assert run.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not Path("a.gguf").exists()
    assert not Path("a.export.json").exists()
    assert bool(temporary_files()) is (number == signal.SIGKILL)
    result = lora("export", trained_run, "--to", "gguf", "--out", "a.gguf", "--verify", "file")
    assert result.code == 0, result.err
    assert temporary_files() == []


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_a_full_disk_leaves_no_output(to: str, trained_run: Path, lora: Lora):
    out = "a.gguf" if to == "gguf" else "a"
    with limit_file_size(100_000):
        result = lora("export", trained_run, "--to", to, "--out", out)
    assert (result.code, result.out) == (1, "")
    assert "Traceback" not in result.err
    assert result.last_two[0].endswith("File too large")
    assert not Path(out).exists()
    assert temporary_files() == []


def test_memory_does_not_grow_with_the_model(workdir: Path):
    """A model of 150 MB in bf16 needs little more memory than one of 400 KB."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained("large")
    AutoTokenizer.from_pretrained("base").save_pretrained("large")
    assert Path("large/model.safetensors").stat().st_size > 2 * MEMORY_LIMIT
    options = ("--to", "gguf", "--quantize", "q8_0", "--verify", "file")
    small, large = peak_memory_of(
        *(["export", model, "--out", f"{model}.gguf", *options] for model in ("base", "large"))
    )
    assert large - small < 2.5 * MEMORY_LIMIT, "includes the pages of the written file, which is mapped to verify it"
