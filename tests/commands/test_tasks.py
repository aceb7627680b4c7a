"""Classification, tagging, regression and seq2seq: check, train, eval and merge, compared with plain transformers."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from lora_cli.training import cpu
from tests.commands.conftest import Lora
from tests.inputs.tiny_tokenizers import build_encoder
from tests.model import families

pytestmark = pytest.mark.slow

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "answer", "question", "France", "Paris"]
LOADERS: dict[str, Any] = {
    "seq-cls": AutoModelForSequenceClassification,
    "token-cls": AutoModelForTokenClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


class Case(NamedTuple):
    """A model family, its kind of tokenizer, a task, and the expected output of the commands."""

    family: str
    tokenizer: str
    task: str
    row: Callable[[str], dict[str, Any]]  # makes a dataset row of a text
    labels: str  # their description in the output of `lora check`
    columns: str  # of the table of `lora eval`


def tagged_row(text: str) -> dict[str, Any]:
    words = text.split()
    return {"tokens": words, "tags": ["B-LOC" if w in ("France", "Paris") else "O" for w in words]}


CASES = {
    "classes": Case(
        "bert",
        "bert",
        "seq-cls",
        lambda text: {"text": text, "label": "yes" if "fox" in text else "no"},
        "2 labels: no, yes",
        "loss accuracy macro_f1 mcc rows",
    ),
    "classes of pairs by number": Case(
        "distilbert",
        "roberta",
        "seq-cls",
        lambda text: {"text": text, "text_pair": text[::-1], "label": len(text) % 3},
        "3 labels: 0, 1, 2",
        "loss accuracy macro_f1 mcc rows",
    ),
    "several classes": Case(
        "roberta",
        "roberta",
        "seq-cls",
        lambda text: {"text": text, "label": [w for w in ("fox", "dog", "Paris") if w in text]},
        "3 labels, several per row: Paris, dog, fox",
        "loss accuracy macro_f1 micro_f1 rows",
    ),
    "a number": Case(
        "deberta-v2",
        "bert",
        "seq-cls",
        lambda text: {"text": text, "text_pair": "the fox", "label": len(text) / 10},
        "regression",
        "mse pearson spearman rows",
    ),
    "a decoder's class": Case(
        "llama-classifier",
        "roberta",
        "seq-cls",
        lambda text: {"text": text, "label": "yes" if "fox" in text else "no"},
        "2 labels: no, yes",
        "loss accuracy macro_f1 mcc rows",
    ),
    "tags": Case(
        "bert-tokens", "bert", "token-cls", tagged_row, "2 labels: B-LOC, O", "loss accuracy macro_f1 entity_f1 words"
    ),
    "texts": Case(
        "t5",
        "t5",
        "seq2seq-lm",
        lambda text: {"prompt": text, "completion": text.upper()[:20]},
        "target tokens",
        "loss perplexity token accuracy target tokens",
    ),
    "texts of BART": Case(
        "bart",
        "roberta",
        "seq2seq-lm",
        lambda text: {"prompt": text, "completion": text.upper()[:20]},
        "target tokens",
        "loss perplexity token accuracy target tokens",
    ),
}


def write_inputs(folder: Path, case: Case) -> None:
    """Write the base, the rows and the recipe of `case` into `folder`."""
    tokenizer = build_encoder(case.tokenizer)
    family = families.FAMILIES[case.family]
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id or 2,
        "eos_token_id": tokenizer.eos_token_id or 3,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    families.write(family._replace(options={**family.options, **ids}), folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 12))) for _ in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(case.row(text)) + "\n" for text in texts))
    recipe = {
        "model": {"path": "base", "dtype": "float32"},
        "task": case.task,
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": "rows.jsonl", "eval": 0.3, "max_length": 128},
        "training": {"max_steps": 4, "learning_rate": 5e-3, "eval_every": None, "save_every": 2},
        "output": "runs/a",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture
def empty_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a separate cache, for commands that use one core."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "available_cores", lambda: 1)
    return tmp_path


def table(out: str) -> dict[str, list[str]]:
    """Return the table of `lora eval`: the name of a model to its cells."""
    return {name: cells for name, *cells in (line.split() for line in out.splitlines() if line.strip())}


@pytest.mark.parametrize("name", CASES)
def test_every_task_is_checked_trained_measured_and_merged(name: str, empty_workdir: Path, lora: Lora):
    case = CASES[name]
    write_inputs(empty_workdir, case)
    checked = lora("check", "recipe.yaml", "--rows", "1")
    assert checked.code == 0, checked.err
    assert case.labels in checked.out
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert "verified: the adapter on disk" in result.err
    assert "LOAD REPORT" not in result.err
    assert "Warning" not in result.err
    if case.task != "seq2seq-lm":
        assert re.search(r"^new head: \w+", result.err, re.MULTILINE)
    measured = lora("eval", "runs/a")
    assert measured.code == 0, measured.err
    assert "Warning" not in measured.err
    assert " ".join(measured.out.split("\n")[0].split()) == case.columns
    cells = table(measured.out)
    last = json.loads((empty_workdir / "runs/a/metrics.jsonl").read_text().splitlines()[-1])
    assert float(cells["adapter"][0]) == pytest.approx(last["eval_loss"], abs=1e-4)
    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert (merged.code, merged.out) == (0, "merged\n"), merged.err
    assert "Warning" not in merged.err

    # The merged model in plain transformers equals the adapter in plain PEFT.
    has_labels = case.task != "seq2seq-lm"
    labels = json.loads((empty_workdir / "runs/a/adapter/labels.json").read_text()) if has_labels else None
    loader, options = LOADERS[case.task], {"num_labels": len(labels["names"])} if labels else {}
    merged_model = loader.from_pretrained("merged").eval()
    base = loader.from_pretrained("base", pad_token_id=merged_model.config.pad_token_id, **options)
    peft_model = PeftModel.from_pretrained(base, "runs/a/adapter").eval()
    if labels:
        assert merged_model.config.id2label == dict(enumerate(labels["names"]))
    ids = torch.tensor([[5, 9, 12, 7, 30, merged_model.config.eos_token_id or 3]])
    inputs = {"input_ids": ids} if has_labels else {"input_ids": ids, "decoder_input_ids": ids}
    with torch.no_grad():
        logits, expected = merged_model(**inputs).logits, peft_model(**inputs).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
    # Measured as a base, the merged model has the metrics of the adapter.
    of_merged = lora("eval", _write_recipe_with_base("merged"))
    assert of_merged.code == 0, of_merged.err
    metrics = [
        [float(re.sub(r"[%,]", "", cell)) for cell in row] for row in (table(of_merged.out)["base"], cells["adapter"])
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)


def test_a_classifier_is_exported_to_onnx_with_its_labels(empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["classes"])
    assert lora("train", "recipe.yaml").code == 0
    result = lora("export", "runs/a", "--to", "onnx", "--out", "graph")
    assert result.code == 0, result.err
    assert "logits: verified" in result.err
    assert json.loads(Path("graph/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    refused = lora("export", "runs/a", "--to", "gguf", "--out", "a.gguf")
    assert refused.last_two[0].startswith("error: --to gguf: seq-cls models are not supported")


def _write_recipe_with_base(base: str) -> str:
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    tree["model"]["path"], tree["output"] = base, "runs/none"
    Path("other.yaml").write_text(yaml.safe_dump(tree))
    return "other.yaml"


def test_eval_uses_the_labels_of_the_trained_head_even_if_rows_have_fewer(empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["classes"])
    assert lora("train", "recipe.yaml").code == 0
    rows = [{"text": "the fox jumps", "label": "yes"}, {"text": "a fox answer", "label": "yes"}]
    Path("yes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = lora("eval", "runs/a", "--data", "yes.jsonl")
    assert result.code == 0, result.err
    Path("new.jsonl").write_text(json.dumps({"text": "the fox", "label": "perhaps"}) + "\n")
    assert lora("eval", "runs/a", "--data", "new.jsonl").last_two == [
        "error: new.jsonl:1: label perhaps: not one of the model's 2 labels",
        "hint: these are no, yes: fix the row, or add the label to data.labels",
    ]


def test_adapters_with_other_labels_are_not_measured_together(empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["classes"])
    for name, labels in (("la", "[no, yes]"), ("lb", "[yes, no]")):
        assert lora("train", "recipe.yaml", "--output", f"runs/{name}", "--set", f"data.labels={labels}").code == 0
    assert lora("eval", "runs/la", "--adapter", "lb=runs/lb/adapter").last_two == [
        "error: runs/lb/adapter: its head has 2 labels: yes, no; that of runs/la/adapter has 2 labels: no, yes",
        "hint: measure each adapter separately",
    ]
    Path("some.jsonl").write_text(json.dumps({"text": "the fox", "label": ["yes"]}) + "\n")
    assert lora("eval", "runs/la", "--data", "some.jsonl").last_two == [
        "error: some.jsonl: its labels are 2 labels, several per row: no, yes, the adapter's 2 labels: no, yes",
        "hint: give rows with labels of the adapter's kind",
    ]


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_eva_and_corda_refuse_a_pooler_until_it_is_excluded(method: str, empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["classes"])
    result = lora("train", "recipe.yaml", "--set", f"adapter.method={method}")
    lines = {
        "eva": [
            "error: adapter.method: eva needs 8 vectors of a batch, twice the rank, but bert.pooler.dense gets 4",
            "hint: leave it out: adapter.exclude_modules: [pooler.dense], or raise training.batch_size",
        ],
        "corda": [
            "error: adapter.method: corda needs layers with every token as input, but one gets one vector per row: "
            "a pooler",
            "hint: leave it out: adapter.exclude_modules: [pooler.dense]",
        ],
    }
    assert result.last_two == lines[method]
    without_pooler = ("--set", "adapter.exclude_modules=[pooler.dense]", "--fresh")
    trained = lora("train", "recipe.yaml", "--set", f"adapter.method={method}", *without_pooler)
    assert trained.code == 0, trained.err


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_virtual_tokens_on_a_model_with_other_config_names(method: str, empty_workdir: Path, lora: Lora):
    write_inputs(
        empty_workdir, CASES["classes of pairs by number"]
    )  # DistilBERT, whose config has `dim` and `n_layers`
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    tree["adapter"] = {"method": method, "virtual_tokens": 4}
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert lora("train", "recipe.yaml", "--set", "adapter.method=prefix", "--fresh").last_two == [
        "error: adapter.method: prefix tuning needs a key/value cache, which distilbert models do not have",
        "hint: write method: prompt or lora",
    ]


def test_a_regression_on_one_row_reports_no_correlation(empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["a number"])
    assert lora("train", "recipe.yaml").code == 0
    Path("one.jsonl").write_text(json.dumps({"text": "the fox", "text_pair": "a dog", "label": 0.5}) + "\n")
    result = lora("eval", "runs/a", "--data", "one.jsonl", "--json", "out.json")
    assert result.code == 0, result.err
    assert json.loads(Path("out.json").read_text())["results"]["adapter"].keys() == {"loss", "accuracy", "tokens"}


def test_labels_with_leading_zeros_are_names_not_numbers(empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["classes"])
    texts = [json.loads(line)["text"] for line in Path("rows.jsonl").read_text().splitlines()]
    rows = [{"text": text, "label": ["01", "02"][i % 2]} for i, text in enumerate(texts)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = lora("check", "recipe.yaml")
    assert "2 labels: 01, 02" in checked.out, checked.err


def test_training_a_classifier_further_keeps_its_labels(empty_workdir: Path, lora: Lora):
    """The labels of the base's head keep their order, although the labels of the rows would be sorted differently."""
    write_inputs(empty_workdir, CASES["classes"])
    model = AutoModelForSequenceClassification.from_pretrained("base", id2label={0: "yes", 1: "no"}, label2id={})
    model.save_pretrained("base")
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert "2 labels: yes, no" in result.err
    assert "new head" not in result.err
    assert json.loads(Path("runs/a/adapter/labels.json").read_text())["names"] == ["yes", "no"]
    result = lora("train", "recipe.yaml", "--fresh", "--set", "data.labels=[no, yes, maybe]")
    assert result.code == 0, result.err
    assert "new head in place of one for other labels: classifier, 195 randomly initialized parameters" in result.err


def test_a_resumed_classifier_run_equals_the_uninterrupted_run(empty_workdir: Path, lora: Lora):
    write_inputs(empty_workdir, CASES["several classes"])
    assert lora("train", "recipe.yaml", "--output", "runs/complete").code == 0
    arguments = ("--set", "training.max_steps=4", "--output", "runs/resumed")
    assert lora("train", "recipe.yaml", *arguments).code == 0
    folder = Path("runs/resumed/checkpoints")
    for file in sorted((folder / "step-00000004").iterdir()):
        file.unlink()
    (folder / "step-00000004").rmdir()
    result = lora("train", "recipe.yaml", *arguments, "--resume")
    assert "resuming after step 2" in result.err
    files = [Path("runs", run, "adapter/adapter_model.safetensors").read_bytes() for run in ("complete", "resumed")]
    assert files[0] == files[1]


def test_max_length_of_roberta_is_limited_by_its_position_offset(empty_workdir: Path, lora: Lora):
    """RoBERTa's 514 position embeddings are enough for 512 tokens; one more would be an index error during training."""
    write_inputs(empty_workdir, CASES["several classes"])
    config = json.loads(Path("base/config.json").read_text())
    rows = [{"text": "fox " * 600, "label": ["fox"]}, {"text": "dog " * 3, "label": ["dog"]}] * 8
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["max_position_embeddings"] = 512 + config["pad_token_id"] + 1
    families.write(
        families.FAMILIES["roberta"]._replace(
            options={key: config[key] for key in ("max_position_embeddings", "pad_token_id", "vocab_size")}
        ),
        empty_workdir / "base",
    )
    arguments = ("--set", "data.overlong=truncate", "--set", "training.max_steps=1", "--set")
    assert lora("train", "recipe.yaml", *arguments, "data.max_length=513").last_two == [
        "error: data.max_length: 513 tokens, but the model has positions for 512",
        "hint: at most 512",
    ]
    result = lora("train", "recipe.yaml", *arguments, "data.max_length=512")
    assert result.code == 0, result.err
    assert "rows truncated to data.max_length" in result.err
