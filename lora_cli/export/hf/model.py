"""`--to safetensors`: the model as a folder for transformers, vLLM and SGLang; unchanged, cast, or quantized to NF4."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.export.hf import nf4
from lora_cli.export.hf.peft_adapter import bits_equal
from lora_cli.export.hf.verify import Rounding, compare_with_source
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import multimodal, prequantized, safetensors_io
from lora_cli.model.finite import is_finite, not_finite_error
from lora_cli.model.quantize import BLOCK_SIZE
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo
from lora_cli.run.read_file import read_json_object
from lora_cli.run.shell import shell_path

MAX_SHARD_BYTES = 2 * 10**9  # bytes of a file, unless a single tensor is larger
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NF4 = "nf4"
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class OutputTensor(NamedTuple):
    """One tensor of the source, and how it is written."""

    key: str
    source: TensorInfo
    dtype: torch.dtype  # written, or quantized from
    packed: bool = False  # quantized to NF4
    transposed: bool = False  # bitsandbytes stores its transpose

    def output_shapes(self) -> nf4.TensorShapes:
        """Return dtypes and shapes of the tensors that are written, by name."""
        if not self.packed:
            return {self.key: (self.dtype, self.source.shape)}
        return nf4.nf4_tensors(self.key, self.source.shape[::-1] if self.transposed else self.source.shape, self.dtype)

    def convert(self, files: ShardFiles) -> dict[str, Tensor]:
        """Return the tensors that are written, by name; `output_shapes` gives their dtypes and shapes.

        Raises:
            LoraError: a value is not finite, or too large for the dtype.
        """
        original = read_tensor(self.source, files)
        if not is_finite(original):
            raise not_finite_error(self.key, self.source.file)
        cast = original.to(self.dtype)
        if cast.dtype != original.dtype and not is_finite(cast):
            largest = float(original.abs().max())
            raise LoraError(
                f"{self.key}: {largest:.3g} is too large for {DTYPE_NAMES[self.dtype]}, "
                f"whose maximum is {torch.finfo(self.dtype).max:.3g}",
                hint="write --quantize bf16, or f32",
                exit_code=1,
            )
        return nf4.quantize_nf4(self.key, cast, transposed=self.transposed) if self.packed else {self.key: cast}


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Check the requested quantization, and that the model is not quantized.

    Raises:
        LoraError: the quantization is not supported, or the model is quantized.
    """
    if options.quantize not in (None, *DTYPES, NF4):
        raise LoraError(
            f"--quantize {options.quantize} is not supported; use one of {', '.join((*DTYPES, NF4))}",
            hint="leave it out to keep the dtype of the weights; for q8_0 and similar types: --to gguf",
        )
    if (quantized := prequantized.detect_prequantized(source.config)) is not None:
        raise LoraError(
            f"--to safetensors: {source.name} is quantized already ({quantized.method})",
            hint="export the 16-bit model that it was made from",
        )
    if options.quantize == NF4 and not nf4.quantized_keys(source, list(safetensors_io.list_tensors(source.folder))):
        raise LoraError(
            f"--quantize nf4: {source.name} has no linear layer that transformers would quantize",
            hint="write bf16",
        )


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the tensors that are written."""
    shapes = _output_shapes(plan_tensors(source, options)).values()
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes)


def _output_shapes(outputs: list[OutputTensor]) -> nf4.TensorShapes:
    return {name: entry for output in outputs for name, entry in output.output_shapes().items()}


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the folder `out`: one tensor after the other, then config and tokenizer.

    Raises:
        LoraError: a value is too large for the dtype.
    """
    out.mkdir(exist_ok=True)
    outputs = plan_tensors(source, options)
    shapes = _output_shapes(outputs)
    with ShardFiles(writable=False) as sources, ShardFiles(writable=True) as targets:
        planned = safetensors_io.plan_shards(shapes, out, targets, max_size=MAX_SHARD_BYTES)
        for output in outputs:
            for name, value in output.convert(sources).items():
                place = planned[name]
                assert (value.dtype, tuple(value.shape)) == (place.dtype, place.shape), name
                targets.write(place.file, safetensors_io.as_bytes(value.contiguous()), place.begin)
    _write_config_and_tokenizer(source, out, options)


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks: tensors read back, and outputs of transformers compared with those of the source in fp32.

    Raises:
        LoraError: `out` is not a complete model that transformers can load.
    """
    outputs = plan_tensors(source, options)
    yield _check_tensors(outputs, out)
    if not options.runtime:
        return
    packed = [output for output in outputs if output.packed]
    # bitsandbytes' CPU kernels apply the scales of other blocks there: see model/quantize.py: check_cpu_4bit.
    unaligned = sorted(o.key for o in packed if o.source.shape[0 if o.transposed else 1] % BLOCK_SIZE)
    if unaligned:
        yield Check(
            "note",
            True,
            f"not run: on the CPU, in_features of 4-bit layers must be a multiple of {BLOCK_SIZE}; "
            f"that of {unaligned[0]} is not",
        )
        return
    changed = packed + [output for output in outputs if output.dtype != output.source.dtype]
    yield from compare_with_source(source, out, Rounding(changed[0].dtype if changed else None, bool(packed)))


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return lines of Python that load the model, and commands that serve it."""
    loader = source.base.auto_class.__name__
    trust = ", trust_remote_code=True" if source.trust_remote_code else ""
    lines = [
        f"from transformers import AutoTokenizer, {loader}",
        f"model = {loader}.from_pretrained({str(out)!r}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r}{trust})",
    ]
    if source.task == "causal-lm":
        flag = " --trust-remote-code" if source.trust_remote_code else ""
        path = shell_path(out)
        lines += [f"lora chat {path}", f"vllm serve {path}{flag}"]
        if options.quantize is None or options.quantize in DTYPES:
            lines.append(f"python -m sglang.launch_server --model-path {path}{flag}")
    return lines


def plan_tensors(source: ExportSource, options: ExportOptions) -> list[OutputTensor]:
    """Return every tensor of the model, and how it is written.

    Raises:
        LoraError: the source is incomplete, or cannot be quantized to NF4.
    """
    stored = safetensors_io.list_tensors(source.folder)
    dtype = _output_dtype(stored, options)
    packed = nf4.quantized_keys(source, list(stored)) if options.quantize == NF4 else {}
    outputs = []
    for key, tensor in stored.items():
        cast = dtype is not None and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        outputs.append(
            OutputTensor(key, tensor, dtype if cast and dtype else tensor.dtype, key in packed, packed.get(key, False))
        )
    return outputs


def read_tensor(stored: TensorInfo, files: ShardFiles) -> Tensor:
    """Read a tensor of a safetensors file, in its shape and dtype there."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    files.read(stored.file, safetensors_io.as_bytes(tensor), stored.begin)
    return tensor


def _output_dtype(stored: dict[str, TensorInfo], options: ExportOptions) -> torch.dtype | None:
    """Return the dtype that floating-point tensors are written in or quantized from; None to keep that of each."""
    if options.quantize != NF4:
        return DTYPES.get(options.quantize or "")
    # Embeddings and norms are not quantized. In fp32 they would be most of the file, so they are written in 16 bits:
    # in float16 if most of the source is, else in bfloat16.
    sizes = {dtype: sum(t.size for t in stored.values() if t.dtype == dtype) for dtype in DTYPES.values()}
    return torch.float16 if max(sizes, key=lambda dtype: sizes[dtype]) == torch.float16 else torch.bfloat16


def _write_config_and_tokenizer(source: ExportSource, out: Path, options: ExportOptions) -> None:
    config: dict[str, Any] = read_json_object(source.folder / "config.json")
    dtype = _output_dtype(safetensors_io.list_tensors(source.folder), options)
    if dtype is not None:
        config = {**_replace_dtype(config, DTYPE_NAMES[dtype]), "dtype": DTYPE_NAMES[dtype]}
    if options.quantize == NF4:
        config["quantization_config"] = nf4.quantization_config()
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    code = sorted(source.folder.glob("*.py")) if "auto_map" in config else []
    for file in (source.folder / "generation_config.json", *code):
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    multimodal.copy_processor_files(source.folder, out)
    source.tokenizer.save_pretrained(str(out))


def _replace_dtype(section: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a section of config.json with `dtype` in place of each dtype, under the key `dtype` or `torch_dtype`."""
    result = {key: _replace_dtype(value, dtype) if isinstance(value, dict) else value for key, value in section.items()}
    if "torch_dtype" in result or "dtype" in result:
        result.pop("torch_dtype", None)
        result["dtype"] = dtype
    return result


def _check_tensors(outputs: list[OutputTensor], out: Path) -> Check:
    """Compare names, shapes, dtypes and values: casts by rounding error, NF4 tensors with bitsandbytes' result."""
    stored = safetensors_io.list_tensors(out)
    mismatched = sorted(stored.keys() ^ {name for output in outputs for name in output.output_shapes()})
    max_error, worst, count, packed, unpacked = 0.0, "", 0, 0, 0
    with ShardFiles(writable=False) as files:
        for output in outputs:
            shapes = output.output_shapes()
            written = {name: stored[name] for name in shapes if name in stored}
            if {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} != shapes:
                mismatched.append(output.key)
                continue
            count += 1
            values = {name: read_tensor(tensor, files) for name, tensor in written.items()}
            original = read_tensor(output.source, files)
            if output.packed:
                packed += original.numel()
                expected = nf4.quantize_nf4(output.key, original.to(output.dtype), transposed=output.transposed)
                differs = any(not torch.equal(values[name], value) for name, value in expected.items())
                if differs or nf4.nf4_error(output.key, values, original, transposed=output.transposed) > 1:
                    mismatched.append(output.key)
                continue
            unpacked += original.numel()
            error = _rounding_error(original, values[output.key])
            if not error <= max_error:
                max_error, worst = error, output.key
    passed = not mismatched and max_error <= 0.5
    text = f"{count} of {len(outputs)} tensors read back, each value within {max_error:.2g} units in the last place"
    if packed:
        text += (
            f"; {packed / (packed + unpacked):.0%} of the weights in 4 bits, codes and scales equal to bitsandbytes'"
        )
    text += f"; {worst} is wrong" if max_error > 0.5 else ""
    text += f"; {len(mismatched)} differ: {mismatched[0]}" if mismatched else ""
    figures = {"tensors": count, "packed": packed, "whole": unpacked, "strayed": len(mismatched)}
    return Check("tensors", passed, text, figures)


def _rounding_error(original: Tensor, written: Tensor) -> float:
    """Return the largest difference, in units in the last place of `written`'s dtype; infinite if one is NaN."""
    if not original.numel():
        return 0.0
    if not written.is_floating_point() or written.dtype.itemsize == 1 or original.dtype == written.dtype:
        return 0.0 if bits_equal(original, written) else math.inf
    limits = torch.finfo(written.dtype)
    # The unit in the last place of a value in [2^e, 2^(e+1)) is 2^e · eps; below the smallest normal number it is
    # constant.
    exponent = original.double().abs().clamp_min(limits.tiny).log2().floor()
    difference = ((original.double() - written.double()).abs() / (exponent.exp2() * limits.eps)).max()
    return float(difference) if bool(difference.isfinite()) else math.inf
