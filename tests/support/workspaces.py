"""Workspaces of `run/atomic.py` as a killed process leaves them."""

import os
from pathlib import Path

from lora_cli.run.workspace import create, new_path


def leave_workspace(path: Path) -> Path:
    """Return a workspace of `path` whose writer was killed."""
    workspace = new_path(path)
    descriptor = create(workspace)
    assert descriptor is not None
    os.close(descriptor)
    return workspace
