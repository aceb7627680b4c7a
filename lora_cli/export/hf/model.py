"""`--to safetensors`: the whole model as a folder for transformers, vLLM and SGLang; as it is, cast, or in 4 bits."""

import json
import math
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import LoraError
from lora_cli.export.hf import nf4, verify
from lora_cli.export.hf.peft_adapter import bits_equal
from lora_cli.export.hf.verify import Rounding
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.model import prequantized, safetensors_io
from lora_cli.model.quantize import BLOCK_SIZE
from lora_cli.model.safetensors_io import ShardFiles, TensorInfo
from lora_cli.model.tasks import TASKS

MAX_SHARD_BYTES = 2 * 10**9  # bytes of a file, where a tensor is not larger
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NF4 = "nf4"
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class OutputTensor(NamedTuple):
    """One tensor of the source, and what becomes of it."""

    key: str
    source: TensorInfo
    dtype: torch.dtype  # that it is written in, or quantised from
    packed: bool = False  # into 4 bits
    turned: bool = False  # as bitsandbytes has it

    def form(self) -> nf4.TensorShapes:
        """Dtypes and shapes of what is written, by name."""
        if not self.packed:
            return {self.key: (self.dtype, self.source.shape)}
        return nf4.nf4_tensors(self.key, self.source.shape[::-1] if self.turned else self.source.shape, self.dtype)

    def make(self, files: ShardFiles) -> dict[str, Tensor]:
        """What is written, by name.

        Raises:
            LoraError: a value is too large for the dtype.
        """
        given = read_tensor(self.source, files)
        cast = given.to(self.dtype)
        if cast.dtype != given.dtype and not bool((cast.isfinite() | ~given.isfinite()).all()):
            largest = float(given[given.isfinite()].abs().max())
            raise LoraError(
                f"{self.key}: {largest:.3g} is too large for {DTYPE_NAMES[self.dtype]}, "
                f"which ends at {torch.finfo(self.dtype).max:.3g}",
                hint="write --quantize bf16, or f32",
                exit_code=1,
            )
        return nf4.quantize_nf4(self.key, cast, turned=self.turned) if self.packed else {self.key: cast}


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """A form there is none of, and a base that is quantised already.

    Raises:
        LoraError: one of these.
    """
    if options.quantize not in (None, *DTYPES, NF4):
        raise LoraError(
            f"--quantize {options.quantize} is none that is written here; what is: {', '.join((*DTYPES, NF4))}",
            hint="leave it out to keep the dtype of the weights; for q8_0 and its like: --to gguf",
        )
    if (already := prequantized.detect_prequantized(subject.config)) is not None:
        raise LoraError(
            f"--to safetensors: {subject.name} is quantised already ({already.method})",
            hint="export the 16-bit model that it was made from",
        )
    if options.quantize == NF4 and not nf4.quantized_keys(subject, list(safetensors_io.list_tensors(subject.folder))):
        raise LoraError(
            f"--quantize nf4: {subject.name} has no linear layer that transformers would quantise",
            hint="write bf16",
        )


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The folder `out`: one tensor after the other, then config and tokenizer.

    Raises:
        LoraError: a value that the dtype cannot hold, or too little room on the disk.
    """
    out.mkdir(exist_ok=True)
    pieces = plan_tensors(subject, options)
    tensors = {name: form for piece in pieces for name, form in piece.form().items()}
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    if (free := shutil.disk_usage(out).free) < size:
        raise LoraError(
            f"{out.parent}: the model takes {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
            hint="make room, or name a place on another disk",
            exit_code=1,
        )
    with ShardFiles(writable=False) as sources, ShardFiles(writable=True) as targets:
        placed = safetensors_io.plan_shards(tensors, out, targets, max_size=MAX_SHARD_BYTES)
        for piece in pieces:
            for name, value in piece.make(sources).items():
                where = placed[name]
                assert (value.dtype, tuple(value.shape)) == (where.dtype, where.shape), name
                targets.write(where.file, safetensors_io.as_bytes(value.contiguous()), where.begin)
    _write_rest(subject, out, options)


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Read back, tensor by tensor, and run by transformers beside the source in fp32."""
    pieces = plan_tensors(subject, options)
    yield _tensors(pieces, out)
    if not options.runtime:
        return
    packed = [piece for piece in pieces if piece.packed]
    ragged = sorted(piece.key for piece in packed if piece.source.shape[0 if piece.turned else 1] % BLOCK_SIZE)
    if ragged:
        # bitsandbytes' CPU kernels give blocks the scales of others there: see model/quantize.py: guard_cpu.
        yield Check(
            "note", True, f"not run: on the CPU, 4-bit layers take rows of {BLOCK_SIZE}s only, and {ragged[0]} is not"
        )
        return
    changed = packed + [piece for piece in pieces if piece.dtype != piece.source.dtype]
    yield from verify.compare_with_source(subject, out, Rounding(changed[0].dtype if changed else None, bool(packed)))


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """How it is loaded and served."""
    loader = TASKS[subject.task].auto_class.__name__
    trust = ", trust_remote_code=True" if subject.trust_remote_code else ""
    lines = [
        f"from transformers import AutoTokenizer, {loader}",
        f"model = {loader}.from_pretrained({str(out)!r}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r}{trust})",
    ]
    if subject.task == "causal-lm":
        served = " --trust-remote-code" if subject.trust_remote_code else ""
        place = shlex.quote(str(out))
        lines += [f"lora chat {place}", f"vllm serve {place}{served}"]
        if options.quantize is None or options.quantize in DTYPES:
            lines.append(f"python -m sglang.launch_server --model-path {place}{served}")
    return lines


def plan_tensors(subject: ExportSource, options: ExportOptions) -> list[OutputTensor]:
    """Every tensor of the model, and what becomes of it.

    Raises:
        LoraError: the source is not whole, or cannot be written in 4 bits.
    """
    stored = safetensors_io.list_tensors(subject.folder)
    dtype = _dtype(stored, options)
    packed = nf4.quantized_keys(subject, list(stored)) if options.quantize == NF4 else {}
    found = []
    for key, tensor in stored.items():
        cast = dtype is not None and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        found.append(
            OutputTensor(key, tensor, dtype if cast and dtype else tensor.dtype, key in packed, packed.get(key, False))
        )
    return found


def read_tensor(stored: TensorInfo, files: ShardFiles) -> Tensor:
    """A tensor of a safetensors file."""
    held = torch.empty(stored.shape, dtype=stored.dtype)
    files.read(stored.file, safetensors_io.as_bytes(held), stored.begin)
    return held


def _dtype(stored: dict[str, TensorInfo], options: ExportOptions) -> torch.dtype | None:
    """What floating tensors are written in, and quantised from; None for what each is in."""
    if options.quantize != NF4:
        return DTYPES.get(options.quantize or "")
    # Of a model in 4 bits, embeddings and norms are most of the bytes in fp32; a half-precision source keeps its own.
    sizes = {dtype: sum(t.size for t in stored.values() if t.dtype == dtype) for dtype in DTYPES.values()}
    return torch.float16 if max(sizes, key=lambda dtype: sizes[dtype]) == torch.float16 else torch.bfloat16


def _write_rest(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    config: dict[str, Any] = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
    dtype = _dtype(safetensors_io.list_tensors(subject.folder), options)
    if dtype is not None:
        config = {**_stamped(config, DTYPE_NAMES[dtype]), "dtype": DTYPE_NAMES[dtype]}
    if options.quantize == NF4:
        config["quantization_config"] = nf4.quantization_config()
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    code = sorted(subject.folder.glob("*.py")) if "auto_map" in config else []
    for file in (subject.folder / "generation_config.json", *code):
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    subject.tokenizer.save_pretrained(str(out))


def _stamped(section: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A section of config.json with the dtype that it names, by its new or its old key, made another."""
    found = {key: _stamped(value, dtype) if isinstance(value, dict) else value for key, value in section.items()}
    if "torch_dtype" in found or "dtype" in found:
        found.pop("torch_dtype", None)
        found["dtype"] = dtype
    return found


def _tensors(pieces: list[OutputTensor], out: Path) -> Check:
    """Names, shapes and dtypes; each value the nearest that its dtype has; codes and scales bitsandbytes' own."""
    held = safetensors_io.list_tensors(out)
    strayed = sorted(held.keys() ^ {name for piece in pieces for name in piece.form()})
    off, where, count, packed, whole = 0.0, "", 0, 0, 0
    with ShardFiles(writable=False) as files:
        for piece in pieces:
            form = piece.form()
            found = {name: held[name] for name in form if name in held}
            if {name: (stored.dtype, stored.shape) for name, stored in found.items()} != form:
                strayed.append(piece.key)
                continue
            count += 1
            values = {name: read_tensor(stored, files) for name, stored in found.items()}
            source = read_tensor(piece.source, files)
            if piece.packed:
                packed += source.numel()
                expected = nf4.quantize_nf4(piece.key, source.to(piece.dtype), turned=piece.turned)
                differ = any(not torch.equal(values[name], value) for name, value in expected.items())
                if differ or nf4.nf4_error(piece.key, values, source, turned=piece.turned) > 1:
                    strayed.append(piece.key)
                continue
            whole += source.numel()
            apart = _units(source, values[piece.key])
            if not apart <= off:
                off, where = apart, piece.key
    passed = not strayed and off <= 0.5
    said = f"{count} of {len(pieces)} tensors read back, each value within {off:.2g} units in the last place"
    if packed:
        said += f"; {packed / (packed + whole):.0%} of the weights in 4 bits, codes and scales bitsandbytes' own"
    said += f"; {where} is off" if off > 0.5 else ""
    said += f"; {len(strayed)} are others: {strayed[0]}" if strayed else ""
    return Check("tensors", passed, said, {"tensors": count, "packed": packed, "whole": whole, "strayed": len(strayed)})


def _units(source: Tensor, found: Tensor) -> float:
    """The largest difference, in units in the last place of what was written; infinite where one is no number."""
    if not source.numel():
        return 0.0
    if not found.is_floating_point() or found.dtype.itemsize == 1 or source.dtype == found.dtype:
        return 0.0 if bits_equal(source, found) else math.inf
    limits = torch.finfo(found.dtype)
    # The unit of a value is 2^e · eps; below the smallest normal number it does not shrink any more.
    exponent = source.double().abs().clamp_min(limits.tiny).log2().floor()
    apart = ((source.double() - found.double()).abs() / (exponent.exp2() * limits.eps)).max()
    return float(apart) if bool(apart.isfinite()) else math.inf
