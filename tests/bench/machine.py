"""Print what the table of scripts/bench says of this machine, as JSON: CPU, threads, memory, dtypes, versions."""

import json
import platform
import sys
from pathlib import Path

import psutil
import torch

from lora_cli.model.device import multiplies
from lora_cli.training.cpu import available_cores
from tests.gpu.machine import VERSIONS, installed

DTYPES = (torch.float32, torch.bfloat16)


def cpu_name() -> str:
    """Return the model name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print the facts in one line."""
    capabilities = torch.cpu.get_capabilities()
    names = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16") if capabilities.get(name)]
    facts = {
        "cpu": cpu_name(),
        "threads": available_cores(),
        "memory": psutil.virtual_memory().total,
        "instructions": ", ".join(names) or "no vector instructions that are used here",
        "dtypes": [str(each).removeprefix("torch.") for each in DTYPES if multiplies(torch.device("cpu"), each)],
        "versions": {name: installed(name) for name in VERSIONS if installed(name)},
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
