"""Do something right before the N-th file operation of this process, such as removing a folder.

    count = count_operations(command)                    # how many there are
    with before_operation(7, lambda: shutil.rmtree(run)):
        command()

Operations are the opening of files, and changes of folders, as Python reports them to audit hooks. Those on files of
Python, of libraries and of the system are not counted.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EVENTS = frozenset(
    f"os.{name}" for name in ("mkdir", "rename", "listdir", "scandir", "remove", "rmdir", "chmod", "truncate")
) | {"open", "shutil.copyfile"}
NOT_COUNTED = (
    "/proc/",
    "/sys/",
    "/dev/",
    "/usr/",
    "/etc/",
    sys.prefix,
    sys.base_prefix,
    str(Path(__file__).parents[2]),
)


class _Watch:
    """The operations so far, and what happens before one of them."""

    def __init__(self) -> None:
        self.installed = self.active = False
        self.count = 0
        self.at = 0
        self.action: Callable[[], None] = lambda: None


_watch = _Watch()


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watch.active or event not in EVENTS:
        return
    path = arguments[0] if arguments else None
    if not isinstance(path, str) or path.startswith(NOT_COUNTED):
        return
    _watch.count += 1
    if _watch.count == _watch.at:
        _watch.active = False  # what the action does is not counted, and it is done once
        _watch.action()


@contextmanager
def before_operation(number: int, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` once, right before the file operation `number` (from 1 on) of the block."""
    if not _watch.installed:
        sys.addaudithook(_hook)  # it cannot be removed, and does nothing outside of the block
        _watch.installed = True
    _watch.count, _watch.at, _watch.action, _watch.active = 0, number, action, True
    try:
        yield
    finally:
        _watch.active = False


def count_operations(command: Callable[[], object]) -> int:
    """Call `command`, and return the number of its file operations."""
    with before_operation(0, lambda: None):
        command()
    return _watch.count
