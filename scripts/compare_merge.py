"""Compare the time and peak memory of merging a large random Llama with `lora merge`, with PEFT, and of copying it.

    python scripts/compare_merge.py              # 2.5 GB of weights; needs 8 GB of free disk space
    python scripts/compare_merge.py --layers 4   # smaller

The commands run in turn. Copying includes writing to the disk (`sync`), as `lora merge` does; PEFT does not sync.
`lora merge` is the whole command with its proof, from start to end; "without imports" leaves out the seconds that its
imports take in the same round. The fold is reading, merging and writing alone, as `lora merge --verify tensors` prints
it. PEFT's seconds leave out imports too. On a machine with other load, only the rounds' ratios say something.

Exits with 1 if `lora merge` needs 1.3 GB of memory or more, or without imports more than 4 times the time of copying,
or if the fold runs at less than 60% of the speed of copying.
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
from statistics import median
from typing import NamedTuple

ROUNDS = 3
MIN_SPEED = 0.6  # of the fold, relative to copying
MAX_TIME = 4.0  # of the command without imports, relative to copying
MAX_MEMORY = 1.3e9  # bytes

BUILD = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models

folder, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
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

    seconds: float  # from start to end
    printed: float  # those that the command prints; 0 if it prints none
    peak: int  # bytes of resident memory, mapped pages of files included
    anonymous: int  # bytes of resident memory without them: what the system cannot drop; 0 where it is not known


def run(command: list[str], pattern: str | None = None) -> Cost:
    """Run a command in a new process; `pattern` finds the seconds that it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        anonymous = 0
        while not (waited := os.wait4(process.pid, os.WNOHANG))[0]:
            anonymous = max(anonymous, anonymous_memory(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    _, status, usage = waited
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command[:4])} failed:\n{text}")
    match = re.search(pattern, text) if pattern else None
    # ru_maxrss of a child is never below the peak of the process that started it: this one, which imports no library.
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, float(match[1]) if match else 0.0, usage.ru_maxrss * unit, anonymous)


def anonymous_memory(pid: int) -> int:
    """Return the bytes of resident memory of a process that are no pages of files; 0 where this is not known."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="decoder layers, with 61 million weights each")
    parser.add_argument("--folder", default=None, help="folder for temporary files (default: the system's)")
    parser.add_argument("--without-peft", action="store_true", help="leave out PEFT's merge in memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        subprocess.run([sys.executable, "-c", BUILD, folder, str(arguments.layers)], check=True)
        files = sorted(Path(folder, "base").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{size / 1e9:.2f} GB of bf16 weights in {len(files)} files; {ROUNDS} rounds, in turn", flush=True)
        out = f"{folder}/out"
        merge = [sys.executable, "-m", "lora_cli", "merge", f"{folder}/adapter", "--out", out]
        commands = {
            "copy": (["sh", "-c", f"cp -r {folder}/base {out} && sync {out}/*"], None),
            "imports": ([sys.executable, "-c", "import lora_cli.commands.merge"], None),
            "fold": ([*merge, "--verify", "tensors"], r" in ([\d.]+) s"),
            "lora merge": (merge, None),
            "PEFT": ([sys.executable, "-c", PEFT, folder, out], r"took ([\d.]+) s"),
        }
        if arguments.without_peft:
            del commands["PEFT"]
        costs: dict[str, list[Cost]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, (command, pattern) in commands.items():
                subprocess.run(["rm", "-rf", out], check=True)
                os.sync()  # earlier writes must not slow this command down
                costs[name].append(run(command, pattern))
    seconds = {name: [cost.printed or cost.seconds for cost in rounds] for name, rounds in costs.items()}
    peak = {name: max(cost.peak for cost in rounds) for name, rounds in costs.items()}
    for name, rounds in costs.items():
        times = ", ".join(f"{each:.2f}" for each in seconds[name])
        anonymous = max(cost.anonymous for cost in rounds)
        print(f"{name:<10}  {times} s  peak {peak[name] / 1e6:,.0f} MB, {anonymous / 1e6:,.0f} MB of it anonymous")
    rounds = list(zip(*(seconds[name] for name in ("copy", "imports", "fold", "lora merge")), strict=True))
    fold = median(copy / fold for copy, _, fold, _ in rounds)
    whole = median(merge / copy for copy, _, _, merge in rounds)
    without_imports = median((merge - imports) / copy for copy, imports, _, merge in rounds)
    best = {name: min(times) for name, times in seconds.items()}
    print(
        f"the fold runs at {fold:.0%} of the speed of copying (median of the rounds; at least {MIN_SPEED:.0%} expected)"
    )
    print(f"lora merge with its proof takes {whole:.1f} times the time of copying,")
    print(f"and without imports {without_imports:.1f} times (at most {MAX_TIME:.0f} expected)")
    ratios = {"fold_speed": fold, "time": whole, "time_without_imports": without_imports}
    print(json.dumps({"bytes": size, "best_seconds": best, "peak": peak, **ratios}))
    return int(fold < MIN_SPEED or without_imports > MAX_TIME or peak["lora merge"] >= MAX_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
