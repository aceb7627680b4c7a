"""What `lora export` reads and where it writes, checked before it is imported. No torch."""

import os
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.export import EXPORTERS
from lora_cli.model.model_path import check_model_path
from lora_cli.run.folder import EXPORT_VERDICT, find_adapter_folder, is_path
from lora_cli.run.output_path import check_not_stdout, check_output_path
from lora_cli.run.read_file import check_folder_readable
from lora_cli.run.shell import shell_path
from lora_cli.setup.adapter_folders import check_not_foreign, check_not_unfinished


def find_exported_adapter(name: str | Path) -> Path | None:
    """Return the adapter folder that `name` is or contains; None for a model.

    Raises:
        LoraError: it is a run that has no adapter yet, an adapter of another tool, or a path where there is nothing.
    """
    if not str(name):
        check_model_path("")
    target = Path(os.path.expanduser(name))
    folder = find_adapter_folder(target)
    check_not_foreign(folder or target)
    if folder is None:
        check_not_unfinished(target)
        if not os.path.lexists(target) and is_path(str(name)):
            raise LoraError(
                f"{name} does not exist", hint="give a run, an adapter or a model: a folder, a .gguf file or a hub id"
            )
        check_folder_readable(target / "adapter")
        check_model_path(str(name), key="MODEL")
    return folder


def check_export_paths(
    out: Path, target: Path, adapter: Path | None, *, to: str, over: Path | None, replace: bool
) -> None:
    """Check where an export is written, and its options that name files.

    Args:
        out: file or folder of the export.
        target: the model, run or adapter.
        adapter: its adapter folder; None for a model.
        to: key of EXPORTERS.
        over: base in GGUF, for a GGUF adapter.
        replace: whether an existing `out` is replaced.

    Raises:
        LoraError: `out` cannot be written, see `check_output_path`; or it, or `over`, does not fit the format.
    """
    suffix = EXPORTERS[to].suffix
    check_not_stdout("--out", out, kind="file" if suffix else "folder")
    if over is not None and to != "gguf-adapter":
        raise LoraError(f"--over is for --to gguf-adapter, not for {to}", hint="leave it out")
    if suffix and out.suffix != suffix:
        name = out.stem if out.suffix.lower() == suffix else out.name
        raise LoraError(
            f"--out {out}: {to} is one file, whose name ends in {suffix}",
            hint=f"write --out {shell_path(out.with_name(name + suffix))}",
        )
    inputs = [path for path in (target, adapter, over) if path is not None]
    for path in (out, verdict_path(out)) if suffix else (out,):
        kind = "file" if suffix else "folder"
        check_output_path(path, inputs=inputs, replace=replace, command="export", kind=kind)


def verdict_path(file: Path) -> Path:
    """Return the path of the verdict of an export that is one file."""
    return file.with_suffix(f".{EXPORT_VERDICT}")
