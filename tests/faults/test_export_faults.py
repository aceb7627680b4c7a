"""An export that is killed or runs out of disk leaves nothing in its place, and no rest that the next keeps."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.commands.conftest import LORA_ON_ONE_CORE, Lora
from tests.faults.test_disk import no_file_above
from tests.faults.test_merge_faults import SPARE, hidden, peak


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ended_on_the_way(number: signal.Signals, trained: Path, lora: Lora):
    command = [*LORA_ON_ONE_CORE, "export", str(trained), "--to", "gguf", "--out", "a.gguf"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while not any("a.gguf" in name for name in hidden()) and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(number)
        assert run.wait() == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not Path("a.gguf").exists()
    assert not Path("a.export.json").exists()
    assert bool(hidden()) is (number == signal.SIGKILL)
    done = lora("export", trained, "--to", "gguf", "--out", "a.gguf", "--verify", "file")
    assert done.code == 0, done.err
    assert hidden() == []


@pytest.mark.parametrize("to", ["gguf", "safetensors"])
def test_a_full_disk(to: str, trained: Path, lora: Lora):
    out = "a.gguf" if to == "gguf" else "a"
    with no_file_above(100_000):
        done = lora("export", trained, "--to", to, "--out", out)
    assert (done.code, done.out) == (1, "")
    assert "Traceback" not in done.err
    assert done.last_two[0].endswith("File too large")
    assert not Path(out).exists()
    assert hidden() == []


def test_memory_does_not_grow_with_the_model(place: Path):
    """A model of 150 MB in bf16 takes little more than one of 400 KB."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained("large")
    AutoTokenizer.from_pretrained("base").save_pretrained("large")
    assert Path("large/model.safetensors").stat().st_size > 2 * SPARE
    peaks = [
        peak("export", model, "--to", "gguf", "--quantize", "q8_0", "--out", f"{model}.gguf", "--verify", "file")
        for model in ("base", "large")
    ]
    assert peaks[1] - peaks[0] < 2.5 * SPARE, "the file that is read back is mapped, and counts"
