"""Table of the export formats, with their inputs and packages, as `lora export --to list` prints it. No torch."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from lora_cli.errors import LoraError


class Exporter(NamedTuple):
    """One format. Its module has `check_supported`, `write`, `verify` and `usage`; see `lora_cli.export.source`."""

    summary: str
    module: str  # in lora_cli/export/
    accepts: str  # "model": a full model, adapters are merged into their base first; "adapter": an adapter, unchanged
    suffix: str = ""  # of the exported file; empty for a folder
    packages: Mapping[str, str] = {}  # purpose of each package that the module imports, by name
    runtime_packages: Mapping[str, str] = {}  # the same for running the export in its runtime
    extra: str = ""  # of this project, that installs `packages`
    runtime_extra: str = ""  # that installs `runtime_packages`

    def load(self) -> ModuleType:
        """Import the module.

        Raises:
            LoraError: a package is missing.
        """
        _require(self.packages, self.extra)
        return import_module(f"lora_cli.export.{self.module}")

    def has_runtime(self) -> bool:
        """Return whether the packages of the runtime are installed."""
        return all(find_spec(name) is not None for name in self.runtime_packages)

    def require_runtime(self) -> None:
        """Check that the packages of the runtime are installed.

        Raises:
            LoraError: one is missing.
        """
        _require(self.runtime_packages, self.runtime_extra)


def _require(packages: Mapping[str, str], extra: str) -> None:
    for name, purpose in packages.items():
        if find_spec(name) is None:
            raise LoraError(f"{purpose} needs the package {name}", hint=f'pip install "lora-cli[{extra}]"')


LLAMA_CPP = {"xllamacpp": "running the export in llama.cpp"}

EXPORTERS: dict[str, Exporter] = {
    "safetensors": Exporter(
        "merged model for transformers, vLLM, SGLang; --quantize bf16, f16, f32 or nf4 (4-bit bitsandbytes)",
        "hf.model",
        accepts="model",
    ),
    "gguf": Exporter(
        "one file for llama.cpp, LM Studio and others; --quantize f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1",
        "gguf.model",
        accepts="model",
        suffix=".gguf",
        packages={"gguf": "writing GGUF"},
        runtime_packages=LLAMA_CPP,
        extra="gguf",
        runtime_extra="llama-cpp",
    ),
    "gguf-adapter": Exporter(
        "the LoRA adapter alone, for llama.cpp's --lora on a base in GGUF (--over BASE.gguf)",
        "gguf.adapter",
        accepts="adapter",
        suffix=".gguf",
        packages={"gguf": "writing GGUF"},
        runtime_packages=LLAMA_CPP,
        extra="gguf",
        runtime_extra="llama-cpp",
    ),
    "ollama": Exporter(
        "a folder with a GGUF file and a Modelfile; --quantize as for gguf",
        "ollama.model",
        accepts="model",
        packages={"gguf": "writing GGUF"},
        runtime_packages=LLAMA_CPP,
        extra="gguf",
        runtime_extra="llama-cpp",
    ),
    "onnx": Exporter(
        "a folder for onnxruntime: a decoder with its KV cache, or a classifier, in fp32",
        "onnx.model",
        accepts="model",
        packages={"onnx": "writing ONNX", "onnxscript": "writing ONNX"},
        runtime_packages={"onnxruntime": "running the export in onnxruntime"},
        extra="onnx",
        runtime_extra="onnx",
    ),
    "vllm": Exporter("the adapter folder, checked against vLLM's rules", "hf.vllm_adapter", accepts="adapter"),
    "peft": Exporter("the adapter folder, for PEFT and transformers", "hf.peft_adapter", accepts="adapter"),
}


def records() -> dict[str, dict[str, Any]]:
    """Return the facts of each format for JSON."""
    return {
        name: {
            "summary": exporter.summary,
            "accepts": exporter.accepts,
            "suffix": exporter.suffix or None,  # null: a folder
            "packages": [*exporter.packages, *exporter.runtime_packages],
            "missing": [each for each in (*exporter.packages, *exporter.runtime_packages) if find_spec(each) is None],
        }
        for name, exporter in EXPORTERS.items()
    }


def describe() -> list[str]:
    """Return two lines for each format: a summary, and what it accepts and needs."""
    width = max(map(len, EXPORTERS))
    inputs = {"model": "a model, or an adapter, which is merged first", "adapter": "an adapter"}
    lines = []
    for name, exporter in EXPORTERS.items():
        packages = {**exporter.packages, **exporter.runtime_packages}
        missing = [package for package in packages if find_spec(package) is None]
        needs = f"needs {', '.join(packages)}" if packages else "needs no other package"
        note = f"; not installed: {', '.join(missing)}" if missing else ""
        lines += [
            f"{name:{width}}  {exporter.summary}",
            f"{'':{width}}  accepts {inputs[exporter.accepts]}; {needs}{note}",
        ]
    return lines
