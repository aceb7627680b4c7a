"""`lora merge`, `export` and `chat`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli import completion
from lora_cli.cli.app import app
from lora_cli.cli.options import (
    AdapterPath,
    BasePath,
    Force,
    Json,
    OtherBase,
    TrustRemoteCode,
    check_choice,
    check_json_file,
    choice_option,
    more_adapters_option,
    target_argument,
    write_record,
)
from lora_cli.errors import LoraError
from lora_cli.model.model_path import check_model_path
from lora_cli.run import console
from lora_cli.run.byte_size import parse_size
from lora_cli.run.output_path import check_output_path, reserve_output_path
from lora_cli.setup.adapter_folders import find_adapter, find_chat_adapters
from lora_cli.setup.export_paths import check_export_paths, find_exported_adapter

DTYPES = ("auto", "bfloat16", "float16", "float32")
WEIGHTS = ("auto", "original", "dequantized")
VERIFY_MERGE = ("logits", "tensors")
VERIFY_EXPORT = ("auto", "file", "runtime")


@app.command(
    examples=["lora merge runs/quickstart --out merged", "lora merge runs/quickstart --out merged --dtype bfloat16"]
)
def merge(
    adapter: AdapterPath,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the merged model.", show_default=False)],
    base: BasePath = None,
    dtype: Annotated[str, choice_option("DTYPE", "auto (as stored), bfloat16, float16 or float32.", DTYPES)] = "auto",
    weights: Annotated[
        str,
        choice_option(
            "KIND", "For a base that was quantized in training: auto (measured), original or dequantized.", WEIGHTS
        ),
    ] = "auto",
    verify: Annotated[
        str, choice_option("HOW", "logits (and every tensor), or tensors alone.", VERIFY_MERGE)
    ] = "logits",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest size of a file.")] = "2GB",
    force: Force = False,
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Subtract the adapter from --base MERGED again.")] = False,
    other_base: OtherBase = False,
    trust: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """Merge an adapter into its base, tensor by tensor, and verify the result."""
    check_json_file(json)
    check_choice("--dtype", dtype, *DTYPES)
    check_choice("--weights", weights, *WEIGHTS)
    check_choice("--verify", verify, *VERIFY_MERGE)
    shard_size = parse_size(max_shard_size, option="--max-shard-size", example="5GB")
    with reserve_output_path(out):
        check_output_path(out, inputs=[find_adapter(adapter)], replace=force, command="merge")
        _check_base(base)
        with console.loading_libraries():
            from lora_cli.commands import merge as command

        request = command.MergeRequest(
            base=base,
            dtype=dtype,
            weights=weights,
            verify=verify,
            max_shard_size=shard_size,
            force=force,
            unmerge=unmerge,
            other_base=other_base,
            trust_remote_code=trust,
        )
        record = command.merge(adapter, out=out, request=request)
    write_record(json, record)


@app.command(
    examples=["lora export --to list", "lora export runs/quickstart --to gguf --quantize q8_0 --out model.gguf"]
)
def export(
    target: Annotated[str | None, target_argument("MODEL|RUN|ADAPTER", "What to export.")] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="`--to list` prints all formats.",
            autocompletion=completion.export_formats,
        ),
    ] = "list",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="File or folder of the export.", show_default=False)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="FORM", help="f32, f16, bf16, q8_0 and others, depending on the format.")
    ] = None,
    over: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The base in GGUF, to verify a GGUF adapter on it.")
    ] = None,
    base: BasePath = None,
    verify: Annotated[
        str, choice_option("HOW", "auto, file (read back), or runtime (run, compare with the original).", VERIFY_EXPORT)
    ] = "auto",
    force: Force = False,
    other_base: OtherBase = False,
    trust: TrustRemoteCode = False,
    json: Json = None,
) -> None:
    """Write a model or an adapter in the format of a runtime, and verify that it is the same model."""
    from lora_cli.export import EXPORTERS, describe, records

    check_json_file(json)
    if to == "list":
        for line in describe():
            console.out.print(line)
        write_record(json, {"formats": records()})
        return
    check_choice("--to", to, *EXPORTERS, "list")
    check_choice("--verify", verify, *VERIFY_EXPORT)
    if target is None or out is None:
        missing = "the model, run or adapter" if target is None else "--out"
        raise LoraError(f"lora export: {missing} is missing", hint=f"lora export runs/NAME --to {to} --out PATH")
    with reserve_output_path(out):
        path = Path(os.path.expanduser(target))
        check_export_paths(out, path, find_exported_adapter(target), to=to, over=over, replace=force)
        _check_base(base)
        with console.loading_libraries():
            from lora_cli.commands import export as command

        request = command.ExportRequest(to, quantize, over, base, verify, force, other_base, trust)
        record = command.export(target, out=out, request=request)
    write_record(json, {"out": out, **record})


@app.command(examples=["lora chat runs/quickstart", "echo 'Who are you?' | lora chat runs/quickstart"])
def chat(
    target: Annotated[Path, target_argument("RUN|ADAPTER|MODEL", "What to chat with.")],
    adapters: Annotated[list[str] | None, more_adapters_option("Another adapter of the same base.")] = None,
    base: BasePath = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, metavar="T", help="0: always the most likely token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of sampling.")] = 42,
    other_base: OtherBase = False,
) -> None:
    """Chat with a base and its adapters; /help lists the commands. Piped input is answered line by line."""
    if system is not None and any("\ud800" <= each <= "\udfff" for each in system):
        raise LoraError("--system has bytes that are not text", hint="write it in UTF-8")
    find_chat_adapters(target, adapters or [])  # mistakes are reported before the import
    _check_base(base)
    with console.loading_libraries():
        from lora_cli.commands import chat as command

    options = command.ChatOptions(temperature, max_new_tokens, system, seed)
    command.chat(target, adapters=adapters or [], base_path=base, options=options, other_base=other_base)


def _check_base(base: str | None) -> None:
    if base is not None:
        check_model_path(base, key="--base")
