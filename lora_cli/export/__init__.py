"""The formats that a model can be exported to, and what each needs. No torch: `lora export --to list` prints this."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

from lora_cli.errors import LoraError


class Exporter(NamedTuple):
    """One format. Its module has `refuse`, `write`, `prove` and `usage`; see `lora_cli.export.source`."""

    summary: str
    module: str  # in lora_cli/export/
    takes: str  # "model": whole, an adapter is merged into its base first; "adapter": the adapter as it is
    suffix: str = ""  # of the file that is written; a folder where there is none
    packages: Mapping[str, str] = {}  # modules it imports, and what each is for
    prover: Mapping[str, str] = {}  # modules that the proof in the real runtime imports
    extra: str = ""  # of this project, that brings `packages`
    prover_extra: str = ""  # that brings `prover`

    @property
    def takes_words(self) -> str:
        """What is given to it."""
        return "a model, or an adapter, which is merged first" if self.takes == "model" else "an adapter"

    def load(self) -> ModuleType:
        """Its module.

        Raises:
            LoraError: a package is missing.
        """
        _need(self.packages, self.extra)
        return import_module(f"lora_cli.export.{self.module}")

    def can_prove(self) -> bool:
        """Whether the runtime that the proof runs in is installed."""
        return all(find_spec(name) is not None for name in self.prover)

    def need_prover(self) -> None:
        """Refuse where the runtime is missing.

        Raises:
            LoraError: it is.
        """
        _need(self.prover, self.prover_extra)


def _need(packages: Mapping[str, str], extra: str) -> None:
    for name, purpose in packages.items():
        if find_spec(name) is None:
            raise LoraError(f"{purpose} needs the package {name}", hint=f'pip install "lora-cli[{extra}]"')


LLAMA_CPP = {"xllamacpp": "running the export in llama.cpp"}

EXPORTERS: dict[str, Exporter] = {
    "safetensors": Exporter(
        "merged model for transformers, vLLM, SGLang; --quantize bf16, f16, f32 or nf4 (4-bit bitsandbytes)",
        "hf.model",
        takes="model",
    ),
    "gguf": Exporter(
        "one file for llama.cpp, LM Studio and others; --quantize f32, f16, bf16, q8_0, q4_0, q4_1, q5_0 or q5_1",
        "gguf.model",
        takes="model",
        suffix=".gguf",
        packages={"gguf": "writing GGUF"},
        prover=LLAMA_CPP,
        extra="gguf",
        prover_extra="llama-cpp",
    ),
    "gguf-adapter": Exporter(
        "the LoRA alone, for llama.cpp's --lora over a base in GGUF (--over BASE.gguf)",
        "gguf.adapter",
        takes="adapter",
        suffix=".gguf",
        packages={"gguf": "writing GGUF"},
        prover=LLAMA_CPP,
        extra="gguf",
        prover_extra="llama-cpp",
    ),
    "ollama": Exporter(
        "a folder with a GGUF file and a Modelfile; --quantize as for gguf",
        "ollama.model",
        takes="model",
        packages={"gguf": "writing GGUF"},
        prover=LLAMA_CPP,
        extra="gguf",
        prover_extra="llama-cpp",
    ),
    "onnx": Exporter(
        "a folder for onnxruntime: a decoder with its cache, or a classifier, in fp32",
        "onnx.model",
        takes="model",
        packages={"onnx": "writing ONNX", "onnxscript": "writing ONNX"},
        prover={"onnxruntime": "running the export in onnxruntime"},
        extra="onnx",
        prover_extra="onnx",
    ),
    "vllm": Exporter("the adapter folder, checked against what vLLM takes", "hf.vllm_adapter", takes="adapter"),
    "peft": Exporter("the adapter folder, for PEFT and transformers", "hf.peft_adapter", takes="adapter"),
}


def describe() -> list[str]:
    """A line for each format: what it is, and what it needs."""
    width = max(map(len, EXPORTERS))
    lines = []
    for name, exporter in EXPORTERS.items():
        needed = {**exporter.packages, **exporter.prover}
        lacking = [package for package in needed if find_spec(package) is None]
        needs = f"needs {', '.join(needed)}" if needed else "needs nothing more"
        here = f"; not installed: {', '.join(lacking)}" if lacking else ""
        lines += [f"{name:{width}}  {exporter.summary}", f"{'':{width}}  takes {exporter.takes_words}; {needs}{here}"]
    return lines
