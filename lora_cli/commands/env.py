"""`lora env`: a report of machine, libraries and settings for issues, without secrets, names or home paths. No torch.

The libraries are imported in another process: one that is broken, or crashes, is a line of the report.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lora_cli.errors import one_line
from lora_cli.run import console
from lora_cli.run.redact import redact_personal
from lora_cli.run.versions import version_of

# Packages whose version decides how a run goes; those that are not installed are left out of the report.
PACKAGES = (
    "lora-cli", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors",
    "huggingface_hub", "numpy", "pyarrow", "pydantic", "typer", "triton", "liger-kernel", "flash-attn", "kernels",
    "gguf", "xllamacpp", "onnx", "onnxruntime", "lm-eval",
)  # fmt: skip
IMPORTED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
IMPORT_TIMEOUT_S = 120
# Instructions that torch has kernels for; without those of bf16 and fp16, these dtypes are emulated.
CPU_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "asimdhp", "bf16", "i8mm", "sve",
)  # fmt: skip
SETTINGS = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "LORA_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "NCCL_",
    "GLOO_", "OMP_", "MKL_", "ONEDNN_", "DNNL_", "KMP_", "TOKENIZERS_", "BNB_", "TRITON_", "ROCR_", "HIP_", "WANDB_",
    "LD_PRELOAD", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "DO_NOT_TRACK", "DISABLE_TELEMETRY", "ORT_", "SLURM_JOB_NUM",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip

# In the other process: one line of JSON for each library, and one for what torch finds.
IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        problem = None
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    print(json.dumps({"name": name, "problem": problem}), flush=True)
torch = sys.modules.get("torch")
if torch is not None and hasattr(torch, "cuda"):
    found = torch.cuda.is_available()
    print(json.dumps({"torch": {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())] if found else [],
        "bf16_gpu": found and torch.cuda.is_bf16_supported(),
        "threads": torch.get_num_threads(),
    }}), flush=True)
"""


def collect() -> dict[str, Any]:
    """Return the report; without secrets, user name, host name and home paths."""
    report: dict[str, Any] = {
        "lora": version_of("lora-cli"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": _system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "gpus": _gpus(),
        "versions": {name: found for name in PACKAGES if (found := version_of(name))},
        **_imports(),
        "caches": _caches(),
        "environment": dict(_settings(os.environ)),
    }
    cleaned: dict[str, Any] = _without_names(report)
    return cleaned


def show(report: Mapping[str, Any]) -> None:
    """Print the report as text."""
    for line in lines(report):
        console.out.print(line)


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report."""
    cpu, memory = report["cpu"], report["memory"]
    yield f"lora {report['lora'] or 'without package metadata'}, Python {report['python']}, {report['system']}"
    features = ", ".join(cpu["features"]) or "none of those that matter"
    yield f"cpu: {cpu['model']}, {cpu['cores']} of {cpu['cores_of_machine']} cores usable; {features}"
    limit = "" if memory["limit"] is None else f", limit of this container {console.format_bytes(memory['limit'])}"
    total, free = console.format_bytes(memory["total"]), console.format_bytes(memory["available"])
    yield f"memory: {total}, {free} available{limit}"
    for gpu in report["gpus"]["found"]:
        yield f"gpu: {gpu['name']}, {gpu['memory']}, driver {gpu['driver']}, compute capability {gpu['compute']}"
    if not report["gpus"]["found"]:
        yield f"gpu: none ({report['gpus']['why']})"
    if (torch := report["torch"]) is not None:
        yield f"torch: CUDA {torch['cuda'] or 'none'}, {len(torch['gpus'])} GPUs usable, {torch['threads']} threads"
    for name, problem in report["problems"].items():
        yield f"broken: {name}: {problem}"
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    for name, cache in report["caches"].items():
        size = f"{console.format_bytes(cache['bytes'])} in {cache['files']:,} files" if cache["files"] else "empty"
        yield f"cache {name}: {size} ({cache['path']})"
    for name, value in report["environment"].items():
        yield f"{name}={one_line(value)}"


def _system() -> str:
    name = ""
    with suppress(OSError):
        name = f" ({platform.freedesktop_os_release().get('PRETTY_NAME', '')})"
    return f"{platform.system()} {platform.release()} {platform.machine()}{name}"


def _cpu() -> dict[str, Any]:
    """Return model, cores that this process may use, and the instructions that matter."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
    fields = [line.partition(":") for line in text.splitlines()]
    by_name = {name.strip(): value.strip() for name, _, value in reversed(fields)}
    flags = (by_name.get("flags") or by_name.get("Features") or "").split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": by_name.get("model name") or platform.processor() or platform.machine(),
        "cores": usable,
        "cores_of_machine": os.cpu_count(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def _memory() -> dict[str, int | None]:
    """Return bytes: of the machine, available now, and the limit of the container (cgroup v2), if there is one."""
    found = psutil.virtual_memory()
    limit = None
    with suppress(OSError, ValueError):  # no such file, or `max`
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    return {"total": found.total, "available": found.available, "limit": limit}


def _gpus() -> dict[str, Any]:
    """Return the NVIDIA GPUs that the driver finds, or why there are none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return {"found": [], "why": "there is no nvidia-smi"}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"found": [], "why": f"nvidia-smi: {type(error).__name__}"}
    if done.returncode:
        return {"found": [], "why": f"nvidia-smi: {one_line((done.stdout + done.stderr).strip())}"}
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 3]
    return {
        "found": [dict(zip(("name", "memory", "driver", "compute"), row, strict=True)) for row in rows],
        "why": None,
    }


def _imports() -> dict[str, Any]:
    """Import the libraries in another process; return what torch finds, and the libraries that are broken."""
    command = [sys.executable, "-c", IMPORTS, *IMPORTED]
    problems: dict[str, str] = {}
    found = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
        output, ending = done.stdout, f"ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        ending = f"took more than {IMPORT_TIMEOUT_S} s"
    left = list(IMPORTED)
    for line in output.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a library prints on import
            continue
        if "torch" in record:
            found = record["torch"]
        elif record.get("name") in left:
            left.remove(record["name"])
            problems |= {record["name"]: record["problem"]} if record["problem"] else {}
    if left:
        problems[left[0]] = f"its import {ending}"
    return {"torch": found, "problems": problems}


def _caches() -> dict[str, dict[str, Any]]:
    """Return path, files and bytes of the caches of lora and of the hub."""
    home = Path(os.path.expanduser("~"))
    hub_home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache", "huggingface")
    )
    folders = {
        "lora": Path(os.environ.get("LORA_CACHE") or home / ".cache" / "lora"),
        "hub": Path(os.environ.get("HF_HUB_CACHE") or hub_home / "hub"),
        "datasets": Path(os.environ.get("HF_DATASETS_CACHE") or hub_home / "datasets"),
    }
    return {name: {"path": str(folder), **_size(folder)} for name, folder in folders.items()}


def _size(folder: Path) -> dict[str, int]:
    files = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                found = os.lstat(os.path.join(place, name))
                files, size = files + 1, size + found.st_blocks * 512
    return {"files": files, "bytes": size}


def _settings(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the variables that change how lora and its libraries work; of secrets, only that they are set."""
    for name, value in sorted(environment.items()):
        if name.startswith(SETTINGS):
            yield name, redact_personal(value, name=name)


def _without_names(value: Any) -> Any:
    """Return the report without the names of user and machine and the home folder, wherever they stand in it."""
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_names(inner) for inner in value]
    return redact_personal(value) if isinstance(value, str) else value
