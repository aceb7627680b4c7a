"""Export a run in every format and quantization, and print the results of each verification (see docs/measurements.md).

    python scripts/compare_exports.py                        # runs/quickstart, created by scripts/quickstart
    python scripts/compare_exports.py runs/NAME --only gguf  # one format

Exits with 1 if an export fails or differs from the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUANTIZATIONS: dict[str, tuple[str | None, ...]] = {  # values of --quantize by format; None: the default
    "gguf": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "gguf-adapter": (None,),
    "ollama": ("q8_0",),
    "onnx": (None,),
    "safetensors": ("bf16", "nf4"),
    "vllm": (None,),
    "peft": (None,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="runs/quickstart")
    parser.add_argument("--only", choices=QUANTIZATIONS)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for to, quantizations in QUANTIZATIONS.items():
            for quantization in quantizations if arguments.only in (None, to) else ():
                failed |= not export(arguments.run, to, quantization, Path(folder))
    sys.exit(failed)


def export(run: str, to: str, quantization: str | None, folder: Path) -> bool:
    """Run one export and print its figures; return whether it is verified."""
    one_file = to.startswith("gguf")
    out = folder / (f"{to}-{quantization}.gguf" if one_file else f"{to}-{quantization}")
    command = [str(Path(sys.executable).with_name("lora")), "export", run, "--to", to, "--out", str(out)]
    if quantization:
        command += ["--quantize", quantization]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    print(f"{to}{f' {quantization}' if quantization else ''}: ", end="")
    if process.returncode:
        print(f"FAILED in {seconds:.0f} s: {process.stderr.strip().splitlines()[-2:]}", flush=True)
        return False
    verdict: dict[str, Any] = json.loads(
        (out.with_suffix(".export.json") if one_file else out / "export.json").read_text()
    )
    size = sum(file["bytes"] for file in verdict["files"].values())
    print(f"{size / 2**20:.0f} MiB, {seconds:.0f} s")
    for check in verdict["checks"]:
        print(f"    {check['name']}: {check['found']}", flush=True)
    return True


if __name__ == "__main__":
    main()
