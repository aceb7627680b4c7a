"""`--to onnx`: a folder for onnxruntime with a decoder and its cache, or a classifier, in fp32.

torch's exporter holds the whole model, and traces it for a second or two a layer: writing took 1.4 times the bytes of
the fp32 weights, proving about 3 times, when onnxruntime holds the model beside transformers (measured on 135M
parameters). Never run on a GPU by this project.
"""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from lora_cli.errors import LoraError
from lora_cli.export.onnx import graph, verify
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import base_model, prequantized

ONNX_FILE = "model.onnx"
CPU = torch.device("cpu")


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """Form, task and architecture, before any weight is read."""
    if options.quantize is not None:
        raise LoraError(
            f"--quantize {options.quantize}: --to onnx writes fp32",
            hint="leave it out; onnxruntime.quantization makes 8 bits of the file, --to gguf or safetensors fewer",
        )
    if subject.task == "seq2seq-lm" or subject.config.is_encoder_decoder:
        raise LoraError(
            f"--to onnx: {subject.config.model_type} reads and writes in two parts, and one graph is written here",
            hint="use --to safetensors",
        )
    if (already := prequantized.detect_prequantized(subject.config)) is not None:
        raise LoraError(
            f"--to onnx: {subject.name} is quantised ({already.method})",
            hint="export the 16-bit model that it was made from; of an adapter, lora merge --weights dequantized first",
        )
    if (reason := _unsupported(subject)) is not None:
        raise LoraError(f"--to onnx: {reason}", hint="use --to safetensors")


def _unsupported(subject: ExportSource) -> str | None:
    """Why no graph can be right for the subject's architecture, where that can be told of its config."""
    config, kind = subject.config, subject.config.model_type
    if config.get_text_config() is not config:
        return f"{kind} reads more than text, and a graph for text alone would leave out part of its weights"
    if kind == "falcon" and config.alibi:
        return "this falcon has ALiBi, which transformers computes in bfloat16 and onnxruntime's CPU does not"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # one for all layers, or for each kind
    if any(each.get("rope_type") == "dynamic" for each in kinds):
        return f"this {kind} computes its rotary frequencies anew as a text grows (rope_type dynamic)"
    trust = subject.trust_remote_code
    model = base_model.skeleton(copy.deepcopy(config), trust_remote_code=trust, task=subject.task)
    layers = DynamicCache(config=config).layers if subject.task == "causal-lm" else []
    if model._is_stateful or not all(isinstance(layer, DynamicLayer) for layer in layers):
        return f"a {kind} model remembers what it read otherwise than by keys and values of each layer"
    if any(isinstance(part, PreTrainedModel) and part._can_set_experts_implementation() for part in model.modules()):
        return f"{kind} is a mixture of experts, whose choice ONNX has no operator for"
    return None


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The folder `out`.

    Raises:
        LoraError: torch's exporter cannot trace the model.
    """
    out.mkdir(exist_ok=True)
    # Eager attention masks with finite numbers. An infinite mask, as sdpa has it, makes NaN of padded rows, which the
    # graph would have to look for and clear in every layer.
    model = load_fp32(subject, attention="eager")
    graph.trace(model, graph.graph_signature(model, subject.task), out / ONNX_FILE)
    model.config.save_pretrained(out)
    generation = subject.model / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, out / generation.name)
    subject.tokenizer.save_pretrained(str(out))


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Read back by onnx, and run by onnxruntime beside transformers, in fp32 both."""
    model = load_fp32(subject)
    form = graph.graph_signature(model, subject.task)
    yield verify.check_tensors(model, form, out / ONNX_FILE)
    if options.runtime:
        yield from verify.check_outputs(subject, model, form, out / ONNX_FILE)


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """How onnxruntime loads it, and by which names it is spoken to."""
    graph = onnx.load(str(out / ONNX_FILE), load_external_data=False).graph
    inputs = [value.name for value in graph.input]
    cache = [name for name in inputs if name.startswith("past_key_values.")]
    plain = [name for name in inputs if name not in cache]
    size = sum(file.stat().st_size for file in out.glob(f"{ONNX_FILE}*"))
    lines = [
        "import onnxruntime",
        f"session = onnxruntime.InferenceSession({str(out / ONNX_FILE)!r})  # {size / 1e9:.1f} GB of fp32 weights",
        f"logits = session.run(['logits'], inputs)[0]  # inputs: int64 {', '.join(plain)}, by their names",
    ]
    if cache:
        lines += [
            f"# and float32 past_key_values.0.key ... {cache[-1]}, of length 0 at first;",
            "# outputs present.0.key ... are the past_key_values of the next tokens, and attention_mask is of both",
        ]
    return lines


def load_fp32(subject: ExportSource, *, attention: str | None = None) -> PreTrainedModel:
    """The model in fp32 on the CPU, as transformers computes it or with another `attention`."""
    options: dict[str, object] = {"trust_remote_code": subject.trust_remote_code}
    loaded = base_model.load_base(
        base_model.ModelSource(str(subject.model), options),
        dtype=torch.float32,
        device=CPU,
        attention=attention,
        task=subject.task,
        labels=subject.labels,
        pad_id=subject.tokenizer.pad_token_id,
    )
    return loaded.model.eval()
