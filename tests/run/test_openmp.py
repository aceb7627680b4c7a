"""OpenMP's threads stop spinning after a few rounds, unless the user has set how they wait."""

import os
import subprocess
import sys

import pytest

from lora_cli.run.openmp import SPINNING, WAITING, limit_spinning

SCRIPT = "import lora_cli.cli, lora_cli.run.openmp as openmp; openmp.limit_spinning(); import torch; torch.ones(2)"


@pytest.mark.parametrize("name", WAITING)
def test_the_users_setting_stays(name: str):
    environment = {name: "7"}
    limit_spinning(environment)
    assert environment == {name: "7"}


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with GNU's OpenMP on Linux")
@pytest.mark.slow
@pytest.mark.parametrize("users", [None, "12345"])
def test_the_library_reads_it_when_torch_is_imported(users: str | None):
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **({"GOMP_SPINCOUNT": users} if users else {})}
    shown = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{users or SPINNING['GOMP_SPINCOUNT']}'" in shown.stderr
