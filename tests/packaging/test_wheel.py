"""The wheel and the source distribution: what is in them, and that pip installs a working `lora` from the wheel."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs")
RECIPES = {path.name for path in (ROOT / "configs").glob("*.yaml")}
PACKAGE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "lora_cli").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and "configs" not in path.parts
}


class Built(NamedTuple):
    """The files that `python -m build` writes."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build in a copy of the working tree, so that no folder is left in it; the wheel is built from the sdist."""
    source = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"], cwd=source, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stdout + result.stderr
    (wheel,), (sdist,) = (source / "dist").glob("*.whl"), (source / "dist").glob("*.tar.gz")
    return Built(wheel, sdist)


def test_the_wheel_has_the_package_the_recipes_and_the_licence_alone(built: Built):
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
        folder = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
        files = {name for name in names if not name.startswith(f"{folder}/")}
        assert files == PACKAGE | {f"lora_cli/configs/{name}" for name in RECIPES}
        assert wheel.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        check_no_paths_of_this_machine({name: wheel.read(name) for name in names})
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "lora developers"
    assert metadata["Keywords"]
    assert metadata.get_all("Project-URL") is None


def test_the_source_distribution_has_what_the_wheel_is_built_from(built: Built):
    with tarfile.open(built.sdist) as sdist:
        files = {file.name.split("/", 1)[1]: file for file in sdist.getmembers() if not file.isdir()}
        assert all(file.isreg() for file in files.values()), "a link is not unpacked everywhere"
        contents = {name: sdist.extractfile(file).read() for name, file in files.items()}  # type: ignore[union-attr]
    needed = {"pyproject.toml", "README.md", "LICENSE"}
    assert contents.keys() >= PACKAGE | needed | {f"lora_cli/configs/{name}" for name in RECIPES}
    assert not any(name.split("/")[0] in ("tests", "runs", "data", "models") for name in contents)
    check_no_paths_of_this_machine(contents)


def check_no_paths_of_this_machine(contents: dict[str, bytes]) -> None:
    words = "|".join(re.escape(str(path)) for path in {ROOT, Path.home(), Path(sys.prefix)} if len(path.parts) > 1)
    found = [name for name, data in contents.items() if re.search(rf"(?:{words})(?:/\w|[\"'\s]|$)".encode(), data)]
    assert found == []


def test_the_wheel_works_where_it_is_installed(built: Built, tmp_path: Path):
    environment, folder = tmp_path / "environment", tmp_path / "folder"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built.wheel])
    # The other packages are those of this environment; what is installed comes first.
    library = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    shared = [line for line in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if line]
    (Path(library) / "shared.pth").write_text("".join(f"{line}\n" for line in shared))
    place = run([python, "-c", "import lora_cli; print(lora_cli.__file__)"], cwd=folder)
    assert Path(place.strip()).is_relative_to(environment)

    lora = environment / "bin" / "lora"
    assert {line.split()[0] + ".yaml" for line in run([lora, "init"], cwd=folder).splitlines()} == RECIPES
    run([lora, "init", "quickstart"], cwd=folder)
    assert (folder / "quickstart.yaml").read_bytes() == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    assert "Fine-tune language models" in run([lora, "--help"], cwd=folder)
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    changes = ["--set", "data.train=rows.jsonl", "--set", "data.format=auto"]
    checked = run([lora, "check", "quickstart.yaml", "--no-model", *changes], cwd=folder)
    assert "prompt-completion" in checked


def run(command: list[object], *, cwd: Path | None = None) -> str:
    """Return what a command prints to stdout, without variables that name the working tree."""
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
