"""`lora init` and `lora methods`: the lists are complete, and no file is overwritten."""

from pathlib import Path

import pytest
import yaml

from lora_cli.commands.init import recipes
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.methods import METHOD_FACTS
from tests.commands.conftest import Lora

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_package_contains_every_recipe():
    assert recipes() == {path.stem: path.read_text() for path in CONFIGS.glob("*.yaml")}
    assert {path.suffix for path in CONFIGS.iterdir()} == {".yaml"}


def test_recipes_are_listed_with_their_titles(lora: Lora):
    result = lora("init")
    assert result.code == 0
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert list(lines) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert lines["guanaco-7b"].startswith("Guanaco 7B: QLoRA of LLaMA 7B")


def test_a_recipe_is_written_but_overwrites_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Lora):
    monkeypatch.chdir(tmp_path)
    result = lora("init", "smollm2-lora")
    assert (result.code, result.out) == (0, "smollm2-lora.yaml\n")
    written = Path("smollm2-lora.yaml")
    assert written.read_bytes() == (CONFIGS / "smollm2-lora.yaml").read_bytes()
    written.write_text("mine")
    refused = lora("init", "smollm2-lora.yaml")
    assert refused.code == 2
    assert refused.last_two[0] == "error: smollm2-lora.yaml exists"
    assert written.read_text() == "mine"


def test_an_unknown_recipe_is_refused_with_a_hint(lora: Lora):
    assert lora("init", "guanaco7b").last_two == [
        "error: there is no recipe 'guanaco7b'",
        "hint: did you mean guanaco-7b?",
    ]
    assert lora("init", "x").last_two[1] == "hint: `lora init` lists them"


def test_methods_are_listed_with_their_recipe_keys(lora: Lora):
    result = lora("methods")
    assert result.code == 0
    assert [line.split(":")[0] for line in result.out.splitlines()[::3]] == list(METHOD_FACTS)
    loftq = result.out[result.out.index("loftq:") : result.out.index("adalora:")]
    assert "rank (16)" in loftq
    assert "on 4-bit bases only; rows can be packed; can be merged" in loftq


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_reference_recipe_is_valid_and_every_value_has_a_comment(path: Path):
    recipe = load_recipe(path)
    assert recipe.output == f"runs/{path.stem}"
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    if path.stem != "quickstart":
        assert any(line.startswith("# Sources: ") for line in lines[:5])
    uncommented = [line for line in lines if ":" in line and not line.rstrip().endswith(":") and "# " not in line]
    assert uncommented == [], "a comment on the line of each value states its effect"


def test_recipes_of_the_same_paper_differ_only_in_the_keys_that_it_varies():
    def flatten(name: str) -> dict[str, object]:
        tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        return {
            f"{section}.{key}": value
            for section, part in tree.items()
            if isinstance(part, dict)
            for key, value in part.items()
        }

    def differing_keys(one: str, two: str) -> set[str]:
        a, b = flatten(one), flatten(two)
        return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}

    keys_by_size = {"model.path", "adapter.dropout", "training.learning_rate"}
    assert differing_keys("guanaco-7b", "guanaco-13b") == {"model.path"}
    assert differing_keys("guanaco-7b", "guanaco-65b") == keys_by_size
    assert differing_keys("guanaco-33b", "guanaco-65b") == {"model.path"}
    keys_by_task = {"data.train", "data.eval", "data.columns", "data.labels", "training.epochs", "training.batch_size"}
    keys_by_task |= {"training.learning_rate", "training.eval_every", "training.save_every"}
    for other in ("sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"):
        assert differing_keys("roberta-glue-cola", f"roberta-glue-{other}") <= keys_by_task


@pytest.mark.parametrize(
    ("name", "published"),
    {
        "guanaco-7b": (64, 16, 0.1, 2e-4, 16),
        "guanaco-13b": (64, 16, 0.1, 2e-4, 16),
        "guanaco-33b": (64, 16, 0.05, 1e-4, 16),
        "guanaco-65b": (64, 16, 0.05, 1e-4, 16),
        "falcon7b-qlora": (64, 16, 0.1, 2e-4, 16),
        "gpt2-medium-e2e": (4, 32, 0.1, 2e-4, 8),
        "roberta-glue-mnli": (8, 16, 0.0, 5e-4, 16),
        "roberta-glue-sst2": (8, 16, 0.0, 5e-4, 16),
        "roberta-glue-mrpc": (8, 16, 0.0, 4e-4, 16),
        "roberta-glue-cola": (8, 16, 0.0, 4e-4, 32),
        "roberta-glue-qnli": (8, 16, 0.0, 4e-4, 32),
        "roberta-glue-qqp": (8, 16, 0.0, 5e-4, 16),
        "roberta-glue-rte": (8, 16, 0.0, 5e-4, 32),
        "roberta-glue-stsb": (8, 16, 0.0, 4e-4, 16),
    }.items(),
)
def test_hyperparameters_equal_those_of_the_papers(name: str, published: tuple[float, ...]):
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    adapter, training = recipe.adapter, recipe.training
    rows = training.rows_per_step or training.batch_size  # per device, as in the code of LoRA on GLUE
    assert (adapter.rank, adapter.alpha, adapter.dropout, training.learning_rate, rows) == published
