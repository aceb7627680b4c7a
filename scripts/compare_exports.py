"""Export a run into every format and form, and print what each proof found: the table in the README.

    python scripts/compare_exports.py                        # runs/quickstart, which scripts/quickstart makes
    python scripts/compare_exports.py runs/NAME --only gguf  # one format

Exits 1 where an export is not proven to be the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FORMS: dict[str, tuple[str | None, ...]] = {
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
    parser.add_argument("--only", choices=FORMS)
    words = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as place:
        for to, forms in FORMS.items():
            for form in forms if words.only in (None, to) else ():
                failed |= not export(words.run, to, form, Path(place))
    sys.exit(failed)


def export(run: str, to: str, form: str | None, place: Path) -> bool:
    """One export; prints its figures, and says whether it is proven."""
    one_file = to.startswith("gguf")
    out = place / (f"{to}-{form}.gguf" if one_file else f"{to}-{form}")
    command = [str(Path(sys.executable).with_name("lora")), "export", run, "--to", to, "--out", str(out)]
    began = time.perf_counter()
    done = subprocess.run([*command, *(["--quantize", form] if form else [])], capture_output=True, text=True)
    taken = time.perf_counter() - began
    print(f"{to}{f' {form}' if form else ''}: ", end="")
    if done.returncode:
        print(f"FAILED in {taken:.0f} s: {done.stderr.strip().splitlines()[-2:]}", flush=True)
        return False
    told: dict[str, Any] = json.loads(
        (out.with_suffix(".export.json") if one_file else out / "export.json").read_text()
    )
    size = sum(file["bytes"] for file in told["files"].values())
    print(f"{size / 2**20:.0f} MiB, {taken:.0f} s")
    for check in told["checks"]:
        print(f"    {check['name']}: {check['found']}", flush=True)
    return True


if __name__ == "__main__":
    main()
