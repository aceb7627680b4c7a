"""Merge a large random Llama by `lora merge` and by PEFT, and copy its files, in turn: time and peak memory.

    python scripts/compare_merge.py              # 3 GB of weights, twelve free on the disk
    python scripts/compare_merge.py --layers 8   # smaller

A copy or merge is done when the disk has it (`sync`). Times of the merges are those of reading, folding and writing:
both spend seconds on importing torch besides; PEFT's is without the sync, which it leaves to others. Exits 1 where
the merge takes 1 GiB of memory or more, or runs at less than 60 % of the speed of copying.
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
LEAST_SPEED = 0.6  # of copying
MOST_MEMORY = 1 << 30  # bytes

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
words = {f"w{i}": i for i in range(100)}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1")
tokenizer.save_pretrained(f"{folder}/base")
adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.02)
config = adapted.peft_config["default"]
config.base_model_name_or_path = f"{folder}/base"
adapted.save_pretrained(f"{folder}/adapter")
"""
PEFT = """
import sys
import time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder, out = sys.argv[1], sys.argv[2]
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, f"{folder}/adapter").merge_and_unload()
merged.save_pretrained(out)
print(f"took {time.perf_counter() - began:.3f} s")
"""


class Taken(NamedTuple):
    """What one way took."""

    seconds: float
    peak: int  # bytes resident, mapped pages included


def run(command: list[str], pattern: str | None = None) -> Taken:
    """A command in a process of its own; its seconds as it tells them, else from start to end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        said.seek(0)
        text = said.read()
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command[:4])} failed:\n{text}")
    found = re.search(pattern, text) if pattern else None
    unit = 1 if sys.platform == "darwin" else 1024
    return Taken(float(found[1]) if found else seconds, usage.ru_maxrss * unit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=23, help="decoder layers of 61 million weights each")
    parser.add_argument("--folder", default=None, help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        subprocess.run([sys.executable, "-c", BUILD, place, str(given.layers)], check=True)
        files = sorted(Path(place, "base").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 1e9:.2f} GB of bf16 weights in {len(files)} files; {ROUNDS} rounds, in turn", flush=True)
        merge = [sys.executable, "-m", "lora_cli", "merge", f"{place}/adapter", "--verify", "tensors"]
        ways = {
            "copy": (["sh", "-c", f"rm -rf {place}/out && cp -r {place}/base {place}/out && sync {place}/out/*"], None),
            "lora merge": ([*merge, "--force", "--out", f"{place}/out"], r" in ([\d.]+) s"),
            "PEFT": ([sys.executable, "-c", PEFT, place, f"{place}/out"], r"took ([\d.]+) s"),
        }
        taken: dict[str, list[Taken]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, (command, pattern) in ways.items():
                subprocess.run(["rm", "-rf", f"{place}/out"], check=True)
                os.sync()  # nothing that was written before is still on its way
                taken[name].append(run(command, pattern))
    best = {name: min(each.seconds for each in all_of) for name, all_of in taken.items()}
    peak = {name: max(each.peak for each in all_of) for name, all_of in taken.items()}
    for name, all_of in taken.items():
        each = ", ".join(f"{one.seconds:.2f}" for one in all_of)
        print(f"{name:<10}  {each} s  {size / best[name] / 1e9:.2f} GB/s at best  peak {peak[name] / 2**20:,.0f} MiB")
    ratios = sorted(copy.seconds / ours.seconds for copy, ours in zip(taken["copy"], taken["lora merge"], strict=True))
    speed = ratios[len(ratios) // 2]
    print(f"lora merge runs at {speed:.0%} of the speed of copying (median of the rounds; {LEAST_SPEED:.0%} wanted)")
    print(json.dumps({"bytes": size, "seconds": best, "peak": peak, "of_copying": speed}))
    return int(speed < LEAST_SPEED or peak["lora merge"] >= MOST_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
