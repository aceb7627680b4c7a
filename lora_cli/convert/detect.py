"""Find the tool that a config belongs to, from its keys. No torch."""

from typing import NamedTuple

from lora_cli.convert.config import Config
from lora_cli.convert.draft import strip_indices
from lora_cli.convert.tools import TOOLS
from lora_cli.errors import LoraError
from lora_cli.run.shell import shell_path

OUR_SECTIONS = ("model.path", "data.train")


class Detected(NamedTuple):
    """A tool, and why."""

    name: str  # of --from
    why: str


def detect_tool(config: Config) -> Detected:
    """Return the tool of a config.

    Raises:
        LoraError: no tool has these keys, or several do.
    """
    written = {strip_indices(key) for key, _ in config.leaves()}
    sections = {part for key in written for part in _prefixes(key)}
    keys = written | sections
    if all(key in keys for key in OUR_SECTIONS):
        raise LoraError(f"{config.file} is a recipe of this tool already", hint=f"lora check {shell_path(config.file)}")
    if config.program in TOOLS:
        where = "the script imports it" if config.kind == "script" else "the command runs it"
        return Detected(config.program, where)
    marks = {name: sorted(keys & tool.marks) for name, tool in TOOLS.items()}
    known = {name: len(keys & tool.known) for name, tool in TOOLS.items()}
    order = sorted(TOOLS, key=lambda name: (len(marks[name]), known[name]), reverse=True)
    best, second = order[0], order[1]
    if len(marks[best]) == 0 or len(marks[best]) == len(marks[second]):
        fitting = [name for name in order if len(marks[name]) == len(marks[best])] if marks[best] else []
        found = f"its keys fit {' and '.join(fitting)}" if fitting else "no tool is known by its keys"
        raise LoraError(f"{config.file}: {found}", hint=f"write --from with one of {', '.join(TOOLS)}")
    total = sum(1 for key in written if {key, *_prefixes(key)} & TOOLS[best].known)
    shown = ", ".join(marks[best][:3])
    sure = "sure" if len(marks[second]) == 0 or len(marks[best]) >= 3 * len(marks[second]) else "likely"
    other = f"; {second} has {', '.join(marks[second][:2])}" if sure == "likely" else ""
    return Detected(best, f"{sure}: only it has {shown}; it knows {total} of {len(written)} keys{other}")


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))] + [parts[-1]] * (parts[-1] == "_component_")
