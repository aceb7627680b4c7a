"""Print what the measurements need to know of this machine, as JSON: GPU, versions, what is missing, product rate.

Imports no module of lora_cli, which needs the newest libraries: what is missing is told also if they are old.
"""

import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "flash-attn")
KERNEL_OPTIONS = {"scale", "window_size", "enable_gqa"}  # of varlen_attn, that model/varlen_attention.py gives
MIN_CAPABILITY = (8, 0)  # as in model/varlen_attention.py
ROUNDS, REPEATS = 3, 10


def installed(package: str) -> str | None:
    """Return the version of `package`; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Return the version of the NVIDIA driver; None if nvidia-smi is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return output.splitlines()[0].strip() if output else None


def describe_device() -> dict[str, Any]:
    """Return name, memory in bytes, compute capability and driver of the GPU, or that there is none."""
    if not torch.cuda.is_available():
        return {"type": "cpu", "name": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def missing() -> list[str]:
    """Return a line for each thing that this machine lacks, and what is not measured therefore."""
    lines = []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in map(Requirement, project["dependencies"]):
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"{requirement.name} {version or 'is not installed'}: lora needs {requirement.specifier}")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        lines.append(f"torch {torch.__version__} has no torch.nn.attention.varlen.varlen_attn: lora cannot be imported")
    else:
        if absent := KERNEL_OPTIONS - signature(varlen_attn).parameters.keys():
            lines.append(f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(absent))}")
    if not torch.cuda.is_available():
        lines.append("no CUDA GPU: prefetch, offload and torch's variable-length kernel are left out")
    elif torch.cuda.get_device_capability(0) < MIN_CAPABILITY:
        lines.append("compute capability below 8.0: torch's variable-length kernel does not run, lora_rows does")
    if installed("trl") is None:
        lines.append("trl is not installed: not compared with it")
    return lines


def product_rate() -> dict[str, Any]:
    """Measure a large matrix product: operations per second, 2 for each multiply-add, the best of some rounds."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(REPEATS):
            a @ b
        synchronize(device)
        best = max(best, 2 * size**3 * REPEATS / (time.perf_counter() - start))
    return {"size": size, "dtype": str(dtype).removeprefix("torch."), "operations_per_second": best}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; on the CPU nothing is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the facts in one line."""
    versions = {"python": re.split(r"\s", sys.version)[0], **{name: installed(name) for name in VERSIONS}}
    facts = {"device": describe_device(), "versions": versions, "lacks": missing(), "product_rate": product_rate()}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
