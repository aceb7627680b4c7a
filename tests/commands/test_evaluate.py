"""`lora eval` as a user types it: on a recipe, a run, an adapter, and several of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.evaluation import text_metrics
from lora_cli.model import save_adapter
from tests.commands.conftest import Lora, WriteRecipe, rows, write_recipe
from tests.model import zoo


def table(out: str) -> dict[str, list[str]]:
    """Name → the figures as shown: loss, perplexity, accuracy, tokens."""
    lines = [line.split() for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 5 and re.fullmatch(r"\d+\.\d{4}", line[1])}


def test_a_run_shows_base_and_adapter(trained: Path, lora: Lora):
    done = lora("eval", "runs/a")
    assert done.code == 0, done.err
    assert list(table(done.out)) == ["base", "adapter"]
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    evals = [f"{r['eval_loss']:.4f}" for r in records if "eval_loss" in r]
    # The same rows and the same numbers as during training.
    assert [figures[0] for figures in table(done.out).values()] == [evals[0], evals[-1]]
    assert all(line.startswith(("rows.jsonl", "measuring ")) for line in done.err.splitlines()), done.err


def test_recipe_and_adapter_name_the_same(trained: Path, lora: Lora):
    by_run = lora("eval", "runs/a").out
    assert lora("eval", "recipe.yaml").out == by_run
    assert lora("eval", "runs/a/adapter").out == by_run


def test_a_recipe_before_its_run_measures_the_base(recipe: WriteRecipe, lora: Lora):
    assert list(table(lora("eval", recipe()).out)) == ["base"]


def test_a_moved_run_is_still_one(trained: Path, lora: Lora):
    before = lora("eval", trained).out
    shutil.move("runs/a", "kept")
    shutil.rmtree("runs")
    assert lora("eval", "kept").out == before


def test_several_adapters_data_and_json(trained: Path, lora: Lora):
    shutil.copytree("runs/a", "runs/b")
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    words = [
        "--adapter",
        "twin=runs/b/adapter",
        "--adapter",
        "runs/b/adapter",
        "--data",
        "other.jsonl",
        "--json",
        "f.json",
    ]
    done = lora("eval", "runs/a", *words)
    assert done.code == 0, done.err
    shown = table(done.out)
    assert list(shown) == ["base", "adapter", "twin", "b"]
    assert shown["adapter"] == shown["twin"] == shown["b"] != shown["base"]
    report = json.loads(Path("f.json").read_text())
    assert report["rows"] == 3
    assert list(report["results"]) == list(shown)
    assert f"{report['results']['twin']['loss']:.4f}" == shown["twin"][0]
    assert report["results"]["base"].keys() == {"loss", "perplexity", "accuracy", "tokens"}


def test_how_sure_the_figures_are_and_how_each_compares_with_the_base(trained: Path, lora: Lora):
    done = lora("eval", "runs/a", "--data", "rows.jsonl", "--json", "f.json")
    assert done.code == 0, done.err
    assert "95% bootstrap confidence intervals (24 rows):" in done.out
    line = re.search(
        r"  adapter: loss ([\d.]+) to ([\d.]+); versus the base: loss better by ([\d.]+) ± ([\d.]+), token", done.out
    )
    assert line is not None, done.out
    report = json.loads(Path("f.json").read_text())["results"]
    base, adapter = report["base"], report["adapter"]
    assert float(line[3]) == pytest.approx(base["loss"] - adapter["loss"], abs=1e-4)
    assert adapter["loss_95"][0] < adapter["loss"] < adapter["loss_95"][1]
    assert [float(line[1]), float(line[2])] == pytest.approx(adapter["loss_95"], abs=1e-4)
    assert "loss_below_base" not in base


def test_a_merged_model_beside_its_adapter(trained: Path, lora: Lora):
    assert lora("merge", "runs/a/adapter", "--out", "merged").code == 0
    done = lora("eval", "runs/a", "--adapter", "merged", "--answers", "1")
    assert done.code == 0, done.err
    shown = table(done.out)
    assert list(shown) == ["base", "adapter", "merged"]
    assert shown["merged"] == shown["adapter"]
    said = dict(re.findall(r"^\[(adapter|merged)\] (.*)$", done.out, re.MULTILINE))
    assert said["adapter"] == said["merged"]


def test_answers_side_by_side(trained: Path, lora: Lora):
    out = lora("eval", "runs/a", "--answers", "2").out
    assert len(re.findall(r"^--- rows\.jsonl:\d+$", out, re.MULTILINE)) == 2
    for who in ("reference", "base", "adapter"):
        assert len(re.findall(rf"^\[{who}\]", out, re.MULTILINE)) == 2


def test_answers_are_scored_against_all_references_and_written_down(trained: Path, lora: Lora):
    """Rows with the same prompt are one question with several right answers."""
    told = [{"role": "user", "content": "What is the capital of France? (0)"}]
    lines = [{"messages": [*told, {"role": "assistant", "content": text}]} for text in ("Paris.", "It is Paris.")]
    Path("both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*lines, *rows(3)[1:]]))
    words = ["--data", "both.jsonl", "--answers", "9", "--metric", "f1", "--metric", "bleu", "--predictions", "p.jsonl"]
    done = lora("eval", "runs/a", *words, "--json", "f.json")
    assert done.code == 0, done.err
    written = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert next(record["references"] for record in written) == ["Paris.", "It is Paris."]
    assert len(written) == 3
    assert written[0]["answers"].keys() == {"base", "adapter"}
    report = json.loads(Path("f.json").read_text())["results"]
    found = text_metrics.compute_text_metrics(
        ["f1", "bleu"],
        [record["answers"]["adapter"]["text"] for record in written],
        [record["references"] for record in written],
    )
    assert {name: report["adapter"][name] for name in found} == pytest.approx(found)
    assert re.search(r"adapter +[\d.]+ +[\d.]+ +3\b", done.out), done.out


TASK = """
task: sayings
dataset_path: json
dataset_kwargs: {data_files: {test: sayings.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_a_task_of_the_harness_from_a_folder_of_yaml(trained: Path, lora: Lora):
    choices = ["Paris is the capital.", "line two", "I am fine."]
    documents = [{"question": f"What is {i}?", "choices": choices, "answer": i % 3} for i in range(6)]
    Path("sayings.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    Path("tasks").mkdir()
    Path("tasks/sayings.yaml").write_text(TASK)
    done = lora("eval", "runs/a", "--tasks", "sayings", "--tasks-dir", "tasks", "--json", "f.json")
    assert done.code == 0, done.err
    report = json.loads(Path("f.json").read_text())["results"]
    found = report["adapter"]["sayings acc"]
    # By hand: the likeliest of the three continuations, by plain PEFT.
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "runs/a/adapter").eval()

    def score(question: str, choice: str) -> float:
        first, whole = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        return sum(float(logits[at - 1, whole[at]]) for at in range(len(first), len(whole)))

    best = [max(range(3), key=lambda i, q=d["question"]: score(q, choices[i])) for d in documents]
    assert found == pytest.approx(sum(b == d["answer"] for b, d in zip(best, documents, strict=True)) / 6)
    assert re.search(rf"sayings acc +[\d.]+ +{found:.4f}", done.out)
    assert lora("eval", "runs/a", "--tasks", "saying", "--tasks-dir", "tasks").last_two[0] == (
        "error: --tasks saying is not a task of the harness"
    )


def test_drawn_answers_hang_on_the_seed(recipe: WriteRecipe, trained: Path, lora: Lora):
    out = []
    for seed in (1, 1, 2):
        path = recipe({"generation": {"temperature": 1.5, "max_new_tokens": 12}, "training.seed": seed})
        done = lora("eval", path, "--data", "rows.jsonl", "--answers", "3")
        assert done.code == 0, done.err
        out.append(re.findall(r"^\[base\].*", done.out, re.MULTILINE))
    assert out[0] == out[1] != out[2]


def test_what_is_asked_of_answers_needs_some(trained: Path, lora: Lora):
    assert lora("eval", "runs/a", "--metric", "f1").last_two == [
        "error: --metric and --predictions need answers",
        "hint: set their number: --answers 100",
    ]


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["--data", "long.jsonl"], {"data.loss_on": "all"}, "with data.loss_on: all no row has a prompt"),
        (["--data", "text.txt"], {}, "--answers: 2 rows skipped, without a prompt before"),
    ],
    ids=["loss_on all", "texts"],
)
def test_rows_without_a_prompt_are_not_answered(
    words: list[str], changes: dict[str, str], said: str, recipe: WriteRecipe, lora: Lora
):
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    Path("text.txt").write_text("one line\nanother\n")
    done = lora("eval", recipe(changes), *words, "--answers", "2")
    assert done.code == 0, done.err
    assert said in done.err
    assert "---" not in done.out


@pytest.fixture
def with_biases(place: Path) -> Path:
    """A base with biases as `qwen`, and an adapter in `biased` that changed them."""
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = zoo.make("qwen2", vocab_size=len(tokenizer))
    model.save_pretrained("qwen")
    tokenizer.save_pretrained("qwen")
    adapted = zoo.adapted(model, bias="all")
    for name, parameter in adapted.named_parameters():
        if "bias" in name:
            parameter.data += 1.0
    save_adapter.save_adapter(adapted, Path("biased"), base="qwen", revision=None)
    return Path("biased")


def test_the_base_is_measured_without_the_biases_of_an_adapter(with_biases: Path, recipe: WriteRecipe, lora: Lora):
    path = recipe({"model.path": "qwen"})
    alone, beside = lora("eval", path, "--answers", "2"), lora("eval", path, "--adapter", "x=biased", "--answers", "2")
    assert beside.code == 0, beside.err
    assert table(beside.out)["base"] == table(alone.out)["base"] != table(beside.out)["x"]
    said = [re.findall(r"^\[base\].*", done.out, re.MULTILINE) for done in (alone, beside)]
    assert said[0] == said[1]
    assert len(said[0]) == 2
    several = lora("eval", path, "--adapter", "x=biased", "--adapter", "y=biased")
    assert several.last_two == [
        "error: biased: this adapter trained biases of the base too, and cannot be measured with others",
        "hint: measure each adapter separately",
    ]


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["nothing"], "nothing is not a recipe, run or adapter folder", "give a YAML file, or a folder of lora train"),
        (
            ["runs/a", "--adapter", "x=runs"],
            "--adapter x=runs: runs has no adapter_config.json",
            "give an adapter folder, or that of a merged model",
        ),
        (
            ["runs/a", "--adapter", "base=runs/a/adapter"],
            "--adapter base=runs/a/adapter: the name base is taken",
            "give another: --adapter NAME=DIR",
        ),
        (
            ["runs/a", "--json", "no/where.json"],
            "--json no/where.json: there is no folder no",
            "make it first",
        ),
        (
            ["far/alone"],
            "far/alone: there is no recipe.yaml next to this adapter, so its base and rows are unknown",
            "write a recipe with its model and data, and run lora eval RECIPE --adapter DIR",
        ),
        (
            ["recipe.yaml", "--data", "no.jsonl"],
            "no.jsonl",
            "",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured(words: list[str], error: str, hint: str, trained: Path, lora: Lora):
    shutil.copytree("runs/a/adapter", "far/alone")
    done = lora("eval", *words)
    assert (done.code, done.out) == (2, "")
    if hint:
        assert done.last_two == [f"error: {error}", f"hint: {hint}"]
    else:
        assert error in done.last_two[0]


def test_nothing_held_out(trained: Path, lora: Lora):
    write_recipe(Path("recipe.yaml"), {"data.eval": None})
    done = lora("eval", "recipe.yaml")
    assert done.code == 2
    assert done.last_two == [
        "error: recipe.yaml: its recipe holds no rows out (data.eval is null)",
        "hint: name rows with --data FILE",
    ]


def test_an_adapter_of_another_base(trained: Path, lora: Lora):
    config = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    config["r"] = 2  # shapes that the tensors do not have
    Path("runs/a/adapter/adapter_config.json").write_text(json.dumps(config))
    done = lora("eval", "runs/a")
    assert (done.code, done.out) == (2, "")
    assert done.last_two[0].startswith("error: runs/a/adapter does not fit base: ")
    assert "\n" not in done.last_two[0]
