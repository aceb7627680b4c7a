"""Workspaces of `run/atomic.py` as a killed process leaves them."""

import os
from pathlib import Path

from lora_cli.run import atomic


def leave_workspace(path: Path) -> Path:
    """Return a workspace of `path` whose writer was killed."""
    workspace = atomic._new_path(path)
    descriptor = atomic._create(workspace)
    assert descriptor is not None
    os.close(descriptor)
    return workspace
