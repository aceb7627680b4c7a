"""Check where a command writes its result (--out), before it starts: no input is overwritten. No torch."""

from collections.abc import Iterable
from pathlib import Path

from lora_cli.errors import LoraError


def check_output_path(out: Path, *, inputs: Iterable[Path], replace: bool, command: str, kind: str = "folder") -> None:
    """Check that `out` can be written.

    Args:
        out: the value of --out.
        inputs: files and folders that the command reads; those that do not exist, such as hub ids, are passed over.
        replace: whether an existing `out` is replaced.
        command: merge, for example; for messages.
        kind: what `out` is, for hints.

    Raises:
        LoraError: `out` is or contains an input, exists without `replace`, or its parent does not exist.
    """
    another = f"name another {kind}"
    for path in inputs:
        if not path.exists():
            continue
        if out.resolve() == path.resolve():
            raise LoraError(f"--out {out} is an input of the {command}", hint=another)
        if out.resolve() in path.resolve().parents:  # a run with its adapter, for example
            raise LoraError(f"--out {out} contains {path}, an input of the {command}", hint=another)
    if out.exists() and not replace:
        raise LoraError(f"--out {out} exists", hint=f"{another}, or replace it with --force")
    if not out.absolute().parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")
