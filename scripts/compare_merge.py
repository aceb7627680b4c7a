"""Compare the time and peak memory of merging a large random Llama with `lora merge`, with PEFT, and of copying it.

    python scripts/compare_merge.py              # 3 GB of weights; needs 12 GB of free disk space
    python scripts/compare_merge.py --layers 8   # smaller

The three run in turn. The times of `lora merge` and of copying include writing to the disk (`sync`), PEFT's does not,
because PEFT does not sync. The times of both merges include reading, merging and writing, but not the seconds for
importing torch. Exits with 1 if `lora merge` needs 1 GiB of memory or more, or runs at less than 60% of the speed of
copying.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROUNDS = 3
MIN_SPEED = 0.6  # relative to copying
MAX_MEMORY = 1 << 30  # bytes

BUILD = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models

folder, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
model.save_pretrained(f"{folder}/base", max_shard_size="1GB")
vocabulary = {f"w{i}": i for i in range(100)}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
tokenizer.save_pretrained(f"{folder}/base")
peft_model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in peft_model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
config = peft_model.peft_config["default"]
config.base_model_name_or_path = f"{folder}/base"
peft_model.save_pretrained(f"{folder}/adapter")
"""
PEFT = """
import sys
import time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1], sys.argv[2]
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, f"{folder}/adapter").merge_and_unload()
merged.save_pretrained(out)
print(f"took {time.perf_counter() - start:.3f} s")
"""


class Cost(NamedTuple):
    """Time and memory of one command."""

    seconds: float
    peak: int  # bytes of resident memory, mapped pages included


def run(command: list[str], pattern: str | None = None) -> Cost:
    """Run a command in a new process; its seconds are those that `pattern` finds in its output, else the wall time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command[:4])} failed:\n{text}")
    match = re.search(pattern, text) if pattern else None
    # ru_maxrss of a child is never below the peak of the process that started it: this one, which imports no library.
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(float(match[1]) if match else seconds, usage.ru_maxrss * unit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=23, help="decoder layers, with 61 million weights each")
    parser.add_argument("--folder", default=None, help="folder for temporary files (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        subprocess.run([sys.executable, "-c", BUILD, folder, str(arguments.layers)], check=True)
        files = sorted(Path(folder, "base").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 1e9:.2f} GB of bf16 weights in {len(files)} files; {ROUNDS} rounds, in turn", flush=True)
        out = f"{folder}/out"
        merge = [sys.executable, "-m", "lora_cli", "merge", f"{folder}/adapter", "--verify", "tensors"]
        commands = {
            "copy": (["sh", "-c", f"rm -rf {out} && cp -r {folder}/base {out} && sync {out}/*"], None),
            "lora merge": ([*merge, "--force", "--out", out], r" in ([\d.]+) s"),
            "PEFT": ([sys.executable, "-c", PEFT, folder, out], r"took ([\d.]+) s"),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, (command, pattern) in commands.items():
                subprocess.run(["rm", "-rf", out], check=True)
                os.sync()  # earlier writes must not slow this command down
                costs[name].append(run(command, pattern))
    best = {name: min(cost.seconds for cost in rounds) for name, rounds in costs.items()}
    peak = {name: max(cost.peak for cost in rounds) for name, rounds in costs.items()}
    for name, rounds in costs.items():
        seconds = ", ".join(f"{cost.seconds:.2f}" for cost in rounds)
        speed = size / best[name] / 1e9
        print(f"{name:<10}  {seconds} s  {speed:.2f} GB/s at best  peak {peak[name] / 2**20:,.0f} MiB")
    ratios = sorted(copy.seconds / ours.seconds for copy, ours in zip(costs["copy"], costs["lora merge"], strict=True))
    of_copying = ratios[len(ratios) // 2]
    print(f"lora merge runs at {of_copying:.0%} of the speed of copying (median; at least {MIN_SPEED:.0%} expected)")
    print(json.dumps({"bytes": size, "seconds": best, "peak": peak, "of_copying": of_copying}))
    return int(of_copying < MIN_SPEED or peak["lora merge"] >= MAX_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
