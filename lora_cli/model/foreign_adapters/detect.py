"""Find out by file names which tool wrote an adapter: mlx-lm, LitGPT, torchtune or PEFT with a pickle. No torch."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.run.shell import shell_path

PEFT_WEIGHTS = "adapter_model.safetensors"


class Tool(NamedTuple):
    """A format of adapters that `lora adapter convert` reads."""

    name: str  # for messages
    weights: re.Pattern[str]  # names of its files of weights


# By the value of --from; the first one whose file a folder has. torchtune also writes a copy in PEFT's format.
TOOLS: dict[str, Tool] = {
    "mlx": Tool("mlx-lm", re.compile(r"(\d+_)?adapters\.(safetensors|npz)")),
    "litgpt": Tool("LitGPT", re.compile(r"lit_model\.pth\.lora")),
    "torchtune": Tool("torchtune", re.compile(r"adapter_(model|\d+)\.pt")),
    "bin": Tool("PEFT (pickled)", re.compile(r"adapter_model\.(bin|pth)")),
}
NUMBERED = re.compile(r"\d+_adapters\..*")  # of mlx-lm: earlier steps than adapters.safetensors


class Found(NamedTuple):
    """An adapter of another tool."""

    tool: str  # key of TOOLS
    weights: Path  # its file of weights

    @property
    def folder(self) -> Path:
        """Folder of the weights, which has the tool's configuration too."""
        return self.weights.parent


def find_foreign(path: Path) -> Found | None:
    """Return the adapter of another tool that `path`, a file or folder, is; None for anything else.

    A folder that PEFT can load is none, also if another tool wrote it.
    """
    if os.path.isfile(path):
        return next((Found(key, path) for key, tool in TOOLS.items() if tool.weights.fullmatch(path.name)), None)
    if os.path.lexists(path / PEFT_WEIGHTS):
        return None
    return next((Found(key, files[0]) for key in TOOLS if (files := _weight_files(path, key))), None)


def conversion_hint(path: Path) -> str:
    """Return the hint that converts the adapter at `path`."""
    return f"convert it: lora adapter convert {shell_path(path)} --out DIR"


def choose_source(path: Path, tool: str | None) -> Found:
    """Return the adapter that `lora adapter convert` converts.

    Args:
        path: SOURCE, a file or folder.
        tool: the value of --from; None to find it out by the names of the files.

    Raises:
        LoraError: there is no such adapter, or several.
    """
    if os.path.isfile(path):
        found = Found(tool, path) if tool is not None else find_foreign(path)
        if found is None:
            raise LoraError(
                f"{path} does not have the name of a file of a known tool",
                hint=f"name the tool with --from: {', '.join(TOOLS)}",
            )
        return found
    if not os.path.isdir(path):
        raise LoraError(f"{path} does not exist", hint="give a folder or a file of mlx-lm, LitGPT, torchtune or PEFT")
    found_files = {key: files for key in TOOLS if tool in (None, key) and (files := _weight_files(path, key))}
    if "torchtune" in found_files:  # the .bin is a copy of it
        found_files.pop("bin", None)
    if not found_files:
        if os.path.lexists(path / PEFT_WEIGHTS) and tool in (None, "bin"):
            raise LoraError(f"{path} is a PEFT adapter already", hint="use it as it is")
        names = sorted(entry.name for entry in path.iterdir())
        of = f"of {TOOLS[tool].name}" if tool else "of mlx-lm, LitGPT, torchtune or PEFT"
        raise LoraError(
            f"{path} has no adapter {of}",
            hint=f"it contains {', '.join(names[:4]) or 'nothing'}; another name needs the file itself and --from",
        )
    files = [file for each in found_files.values() for file in each]
    if len(files) > 1:
        raise LoraError(
            f"{path} has several adapters: {', '.join(file.name for file in files[:4])}", hint="name one of the files"
        )
    return Found(next(iter(found_files)), files[0])


def _weight_files(folder: Path, tool: str) -> list[Path]:
    """Return a tool's files of weights in a folder; of mlx-lm those of earlier steps only if there is no other."""
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):  # no folder, or no permission: what cannot be read is reported where it is read
        return []
    files = [folder / name for name in names if TOOLS[tool].weights.fullmatch(name)]
    last = [file for file in files if not NUMBERED.fullmatch(file.name)]
    return last or files
