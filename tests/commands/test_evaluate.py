"""`lora eval` of recipes, runs and adapters: metrics, confidence intervals, generated answers and lm-eval tasks."""

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
from tests.commands.conftest import Lora, WriteRecipe, remove_checksums, rows, write_recipe
from tests.model import zoo


def table(out: str) -> dict[str, list[str]]:
    """Return the printed table: the name of a model to its loss, perplexity, accuracy and tokens."""
    lines = [line.split() for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 5 and re.fullmatch(r"\d+\.\d{4}", line[1])}


def test_eval_of_a_run_measures_base_and_adapter(trained_run: Path, lora: Lora):
    result = lora("eval", "runs/a")
    assert result.code == 0, result.err
    assert list(table(result.out)) == ["base", "adapter"]
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    evals = [f"{r['eval_loss']:.4f}" for r in records if "eval_loss" in r]
    # The rows are the same as during training, so the losses are too.
    assert [cells[0] for cells in table(result.out).values()] == [evals[0], evals[-1]]
    assert all(line.startswith(("rows.jsonl", "measuring ")) for line in result.err.splitlines()), result.err


def test_eval_of_the_recipe_or_the_adapter_equals_eval_of_the_run(trained_run: Path, lora: Lora):
    by_run = lora("eval", "runs/a").out
    assert lora("eval", "recipe.yaml").out == by_run
    assert lora("eval", "runs/a/adapter").out == by_run


def test_eval_and_merge_of_a_checkpoint_use_the_rows_of_its_run(trained_run: Path, lora: Lora):
    by_run = lora("eval", "runs/a").out
    # Of the last step; its adapter is the run's.
    assert lora("eval", "runs/a/checkpoints/step-00000004").out == by_run
    merged = lora("merge", "runs/a/checkpoints/step-00000004", "--out", "merged")
    assert " held-out rows (" in merged.err, merged.err


def test_eval_of_a_recipe_without_a_run_measures_the_base(recipe: WriteRecipe, lora: Lora):
    assert list(table(lora("eval", recipe()).out)) == ["base"]


def test_loss_flags_of_evaluation_rows_are_followed(recipe: WriteRecipe, lora: Lora):
    def measured(name: str, messages: list[dict[str, object]]) -> str:
        Path(name).write_text(json.dumps({"messages": messages}) + "\n")
        return table(lora("eval", recipe(), "--data", name).out)["base"][-1]

    question, answer = rows(1)[0]["messages"]
    alone = measured("alone.jsonl", [question, answer])
    parts = [{"type": "text", "text": "Well. ", "loss": False}, {"type": "text", "text": answer["content"]}]
    assert measured("turn.jsonl", [question, {**answer, "weight": 0}, question, answer]) == alone
    assert measured("part.jsonl", [question, {**answer, "content": parts}]) == alone


def test_eval_of_a_moved_run_is_the_same(trained_run: Path, lora: Lora):
    before = lora("eval", trained_run).out
    shutil.move("runs/a", "kept")
    shutil.rmtree("runs")
    assert lora("eval", "kept").out == before


def test_eval_with_several_adapters_other_data_and_a_json_report(trained_run: Path, lora: Lora):
    shutil.copytree("runs/a", "runs/b")
    Path("other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    arguments = [
        "--adapter",
        "twin=runs/b/adapter",
        "--adapter",
        "runs/b/adapter",
        "--data",
        "other.jsonl",
        "--json",
        "f.json",
    ]
    result = lora("eval", "runs/a", *arguments)
    assert result.code == 0, result.err
    shown = table(result.out)
    assert list(shown) == ["base", "adapter", "twin", "b"]
    assert shown["adapter"] == shown["twin"] == shown["b"] != shown["base"]
    report = json.loads(Path("f.json").read_text())
    assert report["rows"] == 3
    assert list(report["results"]) == list(shown)
    assert f"{report['results']['twin']['loss']:.4f}" == shown["twin"][0]
    assert report["results"]["base"].keys() == {"loss", "perplexity", "accuracy", "tokens"}


def test_eval_reports_confidence_intervals_and_the_difference_from_the_base(trained_run: Path, lora: Lora):
    result = lora("eval", "runs/a", "--data", "rows.jsonl", "--json", "f.json")
    assert result.code == 0, result.err
    assert "95% bootstrap confidence intervals (24 rows):" in result.out
    line = re.search(
        r"  adapter: loss ([\d.]+) to ([\d.]+); versus the base: loss better by ([\d.]+) ± ([\d.]+), token", result.out
    )
    assert line is not None, result.out
    report = json.loads(Path("f.json").read_text())["results"]
    base, adapter = report["base"], report["adapter"]
    assert float(line[3]) == pytest.approx(base["loss"] - adapter["loss"], abs=1e-4)
    assert adapter["loss_95"][0] < adapter["loss"] < adapter["loss_95"][1]
    assert [float(line[1]), float(line[2])] == pytest.approx(adapter["loss_95"], abs=1e-4)
    assert "loss_below_base" not in base


def test_a_merged_model_has_the_metrics_and_answers_of_its_adapter(trained_run: Path, lora: Lora):
    assert lora("merge", "runs/a/adapter", "--out", "merged").code == 0
    result = lora("eval", "runs/a", "--adapter", "merged", "--answers", "1")
    assert result.code == 0, result.err
    shown = table(result.out)
    assert list(shown) == ["base", "adapter", "merged"]
    # The last digit that is printed may differ: the adapter's product is a sum of its own.
    merged, adapter = ([float(re.sub("[%,]", "", cell)) for cell in shown[name]] for name in ("merged", "adapter"))
    assert merged == pytest.approx(adapter, rel=1e-4)
    answers = dict(re.findall(r"^\[(adapter|merged)\] (.*)$", result.out, re.MULTILINE))
    assert answers["adapter"] == answers["merged"]


def test_answers_of_base_and_adapter_are_printed_with_the_reference(trained_run: Path, lora: Lora):
    out = lora("eval", "runs/a", "--answers", "2").out
    assert len(re.findall(r"^--- rows\.jsonl:\d+$", out, re.MULTILINE)) == 2
    for name in ("reference", "base", "adapter"):
        assert len(re.findall(rf"^\[{name}\]", out, re.MULTILINE)) == 2


def test_answers_are_scored_with_all_references_and_written_to_a_file(trained_run: Path, lora: Lora):
    """Rows with the same prompt become one question with several references."""
    prompt = [{"role": "user", "content": "What is the capital of France? (0)"}]
    same_prompt = [
        {"messages": [*prompt, {"role": "assistant", "content": text}]} for text in ("Paris.", "It is Paris.")
    ]
    Path("both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*same_prompt, *rows(3)[1:]]))
    arguments = ["--data", "both.jsonl", "--answers", "9", "--metric", "f1", "--metric", "bleu"]
    arguments += ["--predictions", "p.jsonl"]
    result = lora("eval", "runs/a", *arguments, "--json", "f.json")
    assert result.code == 0, result.err
    predictions = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert next(record["references"] for record in predictions) == ["Paris.", "It is Paris."]
    assert len(predictions) == 3
    assert predictions[0]["answers"].keys() == {"base", "adapter"}
    report = json.loads(Path("f.json").read_text())["results"]
    expected = text_metrics.compute_text_metrics(
        ["f1", "bleu"],
        [record["answers"]["adapter"]["text"] for record in predictions],
        [record["references"] for record in predictions],
    )
    assert {name: report["adapter"][name] for name in expected} == pytest.approx(expected)
    assert re.search(r"adapter +[\d.]+ +[\d.]+ +3\b", result.out), result.out


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


@pytest.mark.slow
def test_an_lm_eval_task_from_a_yaml_file_is_measured(trained_run: Path, lora: Lora):
    choices = ["Paris is the capital.", "line two", "I am fine."]
    documents = [{"question": f"What is {i}?", "choices": choices, "answer": i % 3} for i in range(6)]
    Path("sayings.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    Path("tasks").mkdir()
    Path("tasks/sayings.yaml").write_text(TASK)
    result = lora("eval", "runs/a", "--tasks", "sayings", "--tasks-dir", "tasks", "--json", "f.json")
    assert result.code == 0, result.err
    report = json.loads(Path("f.json").read_text())["results"]
    accuracy = report["adapter"]["sayings acc"]
    # Expected: the accuracy of the most likely of the three continuations, computed with plain PEFT.
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "runs/a/adapter").eval()

    def log_likelihood(question: str, choice: str) -> float:
        prompt, ids = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))

    best = [max(range(3), key=lambda i, q=d["question"]: log_likelihood(q, choices[i])) for d in documents]
    assert accuracy == pytest.approx(sum(b == d["answer"] for b, d in zip(best, documents, strict=True)) / 6)
    assert re.search(rf"sayings acc +[\d.]+ +{accuracy:.4f}", result.out)
    assert lora("eval", "runs/a", "--tasks", "saying", "--tasks-dir", "tasks").last_two[0] == (
        "error: --tasks saying is not a task of the harness"
    )


def test_sampled_answers_depend_on_the_seed(recipe: WriteRecipe, trained_run: Path, lora: Lora):
    answers = []
    for seed in (1, 1, 2):
        path = recipe({"generation": {"temperature": 1.5, "max_new_tokens": 12}, "training.seed": seed})
        result = lora("eval", path, "--data", "rows.jsonl", "--answers", "3")
        assert result.code == 0, result.err
        answers.append(re.findall(r"^\[base\].*", result.out, re.MULTILINE))
    assert answers[0] == answers[1] != answers[2]


def test_metric_without_answers_is_refused(trained_run: Path, lora: Lora):
    assert lora("eval", "runs/a", "--metric", "f1").last_two == [
        "error: --metric and --predictions need answers",
        "hint: set their number: --answers 100",
    ]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--data", "long.jsonl"], {"data.loss_on": "all"}, "rows have no prompt with data.loss_on: all"),
        (["--data", "text.txt"], {}, "--answers: 2 rows skipped, without a prompt before"),
    ],
    ids=["loss_on all", "texts"],
)
def test_rows_without_a_prompt_are_not_answered(
    arguments: list[str], changes: dict[str, str], message: str, recipe: WriteRecipe, lora: Lora
):
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    Path("text.txt").write_text("one line\nanother\n")
    result = lora("eval", recipe(changes), *arguments, "--answers", "2")
    assert result.code == 0, result.err
    assert message in result.err
    assert "---" not in result.out


@pytest.fixture
def adapter_with_biases(workdir: Path) -> Path:
    """Write a base with biases to `qwen`, and an adapter that changes them to `biased`; return the adapter."""
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


def test_the_base_is_measured_without_the_biases_of_an_adapter(
    adapter_with_biases: Path, recipe: WriteRecipe, lora: Lora
):
    path = recipe({"model.path": "qwen"})
    base_only = lora("eval", path, "--answers", "2")
    both = lora("eval", path, "--adapter", "x=biased", "--answers", "2")
    assert both.code == 0, both.err
    assert table(both.out)["base"] == table(base_only.out)["base"] != table(both.out)["x"]
    answers = [re.findall(r"^\[base\].*", result.out, re.MULTILINE) for result in (base_only, both)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2
    several = lora("eval", path, "--adapter", "x=biased", "--adapter", "y=biased")
    assert several.last_two == [
        "error: biased: this adapter trained biases of the base too, and cannot be measured with others",
        "hint: measure each adapter separately",
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["nothing"], "nothing is not a recipe, run or adapter folder", "give a YAML file, or a folder of lora train"),
        (
            ["runs/a", "--adapter", "x=runs"],
            "--adapter x=runs: runs has no adapter_config.json",
            "give a run of lora train, or an adapter folder",
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
def test_wrong_arguments_give_an_error_and_a_hint(
    arguments: list[str], error: str, hint: str, trained_run: Path, lora: Lora
):
    shutil.copytree("runs/a/adapter", "far/alone")
    result = lora("eval", *arguments)
    assert (result.code, result.out) == (2, "")
    if hint:
        assert result.last_two == [f"error: {error}", f"hint: {hint}"]
    else:
        assert error in result.last_two[0]


def test_a_recipe_without_held_out_rows_needs_data(trained_run: Path, lora: Lora):
    write_recipe(Path("recipe.yaml"), {"data.eval": None})
    result = lora("eval", "recipe.yaml")
    assert result.code == 2
    assert result.last_two == [
        "error: recipe.yaml: its recipe has no evaluation rows (data.eval is null)",
        "hint: name rows with --data FILE",
    ]


def test_an_adapter_that_does_not_fit_the_base_is_refused(trained_run: Path, lora: Lora):
    config = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    config["r"] = 2  # does not match the shapes of the tensors
    (remove_checksums(trained_run / "adapter") / "adapter_config.json").write_text(json.dumps(config))
    result = lora("eval", "runs/a")
    assert (result.code, result.out) == (2, "")
    assert result.last_two[0].endswith(" has rank 4, and 2 in the configuration")
    assert "\n" not in result.last_two[0]


@pytest.mark.slow
def test_rows_that_prompt_in_another_way_than_the_training_rows_are_told(trained_run: Path, lora: Lora):
    rows = [{"prompt": f"Q: who? {number} A:", "completion": " Paris."} for number in range(3)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = (
        "note: the rows of text.jsonl are literal text, but the training rows of adapter prompt by the chat template: "
        "the figures are for prompts that it was not trained on"
    )
    result = lora("eval", trained_run, "--data", "text.jsonl")
    assert result.code == 0, result.err
    assert result.err.splitlines().count(told) == 1
    assert "prompts that it was not" not in lora("eval", trained_run).err
    record = json.loads(Path("runs/a/adapter/trained_on.json").read_text())
    (remove_checksums(trained_run / "adapter") / "trained_on.json").write_text(
        json.dumps({**record, "prompts": "text"})
    )
    of_chats = lora("eval", trained_run).err
    assert (
        "note: the rows of data.eval prompt by the chat template, but the training rows of adapter are lit" in of_chats
    )
    assert "prompts that it was not" not in lora("eval", trained_run, "--data", "text.jsonl").err
