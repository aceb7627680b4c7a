"""Laws of a base that is sharded over processes (FSDP2): loss and gradients are those of the whole base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.recipe.methods import METHOD_FACTS
from tests.model import families, multimodal_families, zoo
from tests.model.multimodal_families import MULTIMODAL
from tests.support import sharded_cases

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"hidden_size": 128, "intermediate_size": 256}  # the CPU's 4-bit kernels need multiples of 64
OFFLOADED = [base + sharded_cases.OFFLOADED for base in sharded_cases.BASES[1:]]
ON_MACHINES = [name for name, spec in sharded_cases.cases().items() if "machines" in spec]  # two, of two processes
NAMES = [*(name for name in sharded_cases.cases() if name not in ON_MACHINES), *sharded_cases.BASES[1:], *OFFLOADED]
ON_FOUR = [
    "method lora",
    "a different number of chunks of labels",
    "4 bits, dora",
    "every 2nd layer recomputed",
    "padded batches",
    "tied",
    "mixtral",
    "batches that do not count are not finite",
    "offloaded, 4 bits, every layer recomputed",
    *ON_MACHINES,
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name, tied in (("untied", False), ("tied", True)):
        zoo.make("llama", tie_word_embeddings=tied, **SIZE).save_pretrained(folder / name)
    families.write(families.FAMILIES["mixtral"], folder / "mixtral")
    return folder


def differences(bases: Path, *names: str, processes: int) -> dict[str, float]:
    """Run the cases in as many processes; one pair of processes for all of them, because starting takes seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "tests" / "support" / "sharded_cases.py"), str(bases), *names]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def on_two(bases: Path) -> dict[str, float]:
    return differences(bases, *NAMES, processes=2)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_with_a_sharded_base_equal_one(on_two: dict[str, float], name: str):
    assert on_two[name] < 1e-5


def test_four_processes_of_which_some_have_fewer_batches_equal_one(bases: Path):
    found = differences(bases, *ON_FOUR, processes=4)
    assert found.keys() == set(ON_FOUR)
    assert max(found.values()) < 1e-5, found


def test_sharded_bases_of_all_families_compute_what_whole_ones_do(bases: Path):
    names = [name for name, family in families.FAMILIES.items() if family.task == "causal-lm"]
    for name in names:
        families.write(families.FAMILIES[name], bases / sharded_cases.FAMILIES / name)
    for name, family in MULTIMODAL.items():
        multimodal_families.write(family, bases / sharded_cases.FAMILIES / f"{name} with towers")
    found = differences(bases, sharded_cases.FAMILIES, processes=2)
    assert found.keys() == {*names, *(f"{name} with towers" for name in MULTIMODAL)}
    assert {name: value for name, value in found.items() if not 0 <= value < 1e-5} == {
        "llama4 with towers": sharded_cases.REFUSED
    }


def test_every_method_that_can_be_sharded_is_compared():
    shardable = {name for name, facts in METHOD_FACTS.items() if facts.shardable}
    assert {name.removeprefix("method ") for name in NAMES if name.startswith("method ")} == shardable
    assert {"corda", "loftq"} == METHOD_FACTS.keys() - shardable
