"""`--to onnx`: a folder for onnxruntime with a decoder and its KV cache, or a classifier, in fp32.

torch's exporter keeps the full model in memory, and traces it in one or two seconds per layer. Writing took 1.4 times
the bytes of the fp32 weights in memory. The checks took about 3 times, because onnxruntime and transformers each load
the model (measured on 135M parameters). This project has never run it on a GPU.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lora_cli.errors import LoraError
from lora_cli.export.onnx import graph
from lora_cli.export.onnx.verify import check_outputs, check_tensors
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import prequantized

ONNX_FILE = "model.onnx"
CPU = torch.device("cpu")


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Check dtype, task and architecture, before any weight is read.

    Raises:
        LoraError: the model cannot be exported to ONNX.
    """
    if options.quantize is not None:
        raise LoraError(
            f"--quantize {options.quantize}: --to onnx writes fp32 only",
            hint="leave it out; onnxruntime.quantization converts to 8 bits, --to gguf or safetensors to fewer",
        )
    if source.task == "seq2seq-lm" or source.config.is_encoder_decoder:
        raise LoraError(
            f"--to onnx: {source.config.model_type} is an encoder-decoder model, which does not fit in one graph",
            hint="use --to safetensors",
        )
    if (quantized := prequantized.detect_prequantized(source.config)) is not None:
        raise LoraError(
            f"--to onnx: {source.name} is quantized ({quantized.method})",
            hint="export the 16-bit model it was made from; for an adapter, run lora merge --weights dequantized first",
        )
    if (reason := _unsupported(source)) is not None:
        raise LoraError(f"--to onnx: {reason}", hint="use --to safetensors")


def _unsupported(source: ExportSource) -> str | None:
    """Return why a graph of this architecture would be wrong, as far as its config shows; None if it is supported."""
    config, model_type = source.config, source.config.model_type
    if config.get_text_config() is not config:
        return (
            f"{model_type} has other inputs than text, and a graph for text alone would leave out part of its weights"
        )
    if model_type == "falcon" and config.alibi:
        return "this falcon uses ALiBi, which transformers computes in bfloat16, and onnxruntime cannot on the CPU"
    rope = getattr(config, "rope_parameters", None) or {}
    # One entry for all layers, or one for each type of layer.
    ropes = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    if any(entry.get("rope_type") == "dynamic" for entry in ropes):
        return f"this {model_type} model recomputes its rotary frequencies as a text grows (rope_type dynamic)"
    model = source.base.skeleton()
    layers = DynamicCache(config=config).layers if source.task == "causal-lm" else []
    if model._is_stateful or not all(isinstance(layer, DynamicLayer) for layer in layers):
        return f"the state of a {model_type} model does not consist of the keys and values of each layer"
    if any(
        isinstance(module, PreTrainedModel) and module._can_set_experts_implementation() for module in model.modules()
    ):
        return f"{model_type} is a mixture of experts, and ONNX has no operator for their selection"
    return None


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the fp32 weights."""
    return 4 * source.parameters


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the folder `out`: graph, weights, config and tokenizer.

    Raises:
        LoraError: torch's exporter cannot trace the model.
    """
    out.mkdir(exist_ok=True)
    # Eager attention masks with finite numbers. An infinite mask, as in sdpa, turns padded rows into NaN, which the
    # graph would have to find and clear in every layer.
    model = load_fp32(source, attention="eager")
    graph.trace(model, graph.graph_signature(model, source.task), out / ONNX_FILE)
    model.config.save_pretrained(out)
    generation = source.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)
    source.tokenizer.save_pretrained(str(out))


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks: weights read back by onnx, and outputs of onnxruntime compared with transformers in fp32."""
    model = load_fp32(source)
    signature = graph.graph_signature(model, source.task)
    yield check_tensors(model, signature, out / ONNX_FILE)
    if options.runtime:
        yield from check_outputs(source, model, signature, out / ONNX_FILE)


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return lines of Python that load and run the graph in onnxruntime, with the names of its inputs and outputs."""
    stored_graph = onnx.load(str(out / ONNX_FILE), load_external_data=False).graph
    inputs = [value.name for value in stored_graph.input]
    cache = [name for name in inputs if name.startswith("past_key_values.")]
    others = [name for name in inputs if name not in cache]
    size = sum(file.stat().st_size for file in out.glob(f"{ONNX_FILE}*"))
    lines = [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({str(out / ONNX_FILE)!r})  # {size / 1e9:.1f} GB of fp32 weights",
        f"logits = session.run(['logits'], inputs)[0]  # inputs by name: int64 {', '.join(others)}",
    ]
    if cache:
        lines += [
            f"# and float32 past_key_values.0.key ... {cache[-1]}, of length 0 in the first call;",
            "# outputs present.0.key ... are the past_key_values of the next call, whose attention_mask covers both",
        ]
    return lines


def load_fp32(source: ExportSource, *, attention: str | None = None) -> PreTrainedModel:
    """Load the model in fp32 on the CPU, with the attention implementation `attention` or transformers' default."""
    return source.base.load(CPU, dtype=torch.float32, attention=attention).model.eval()
