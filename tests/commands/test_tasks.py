"""Classes, tags, numbers and texts: `lora check`, `train`, `eval` and `merge` for each task, and what others load."""

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

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "answer", "question", "France", "Paris"]
LOADERS: dict[str, Any] = {
    "seq-cls": AutoModelForSequenceClassification,
    "token-cls": AutoModelForTokenClassification,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


class Case(NamedTuple):
    """A family with a tokenizer of its kind, a task, and what a sentence becomes as a row."""

    family: str
    tokenizer: str
    task: str
    row: Callable[[str], dict[str, Any]]
    labels: str  # what the ledger says of them
    columns: str  # of `lora eval`


def tags(text: str) -> dict[str, Any]:
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
        "bert-tokens", "bert", "token-cls", tags, "2 labels: B-LOC, O", "loss accuracy macro_f1 entity_f1 words"
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


def furnish(folder: Path, case: Case) -> None:
    """A pretrained base, rows and a recipe."""
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
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 12))) for _ in range(40)]
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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "available_cores", lambda: 1)
    return tmp_path


def figures(out: str) -> dict[str, list[str]]:
    """The table of `lora eval`, cell by cell, by the name of its row."""
    return {name: cells for name, *cells in (line.split() for line in out.splitlines() if line.strip())}


@pytest.mark.parametrize("name", CASES)
def test_a_task_from_rows_to_a_merged_model(name: str, here: Path, lora: Lora):
    case = CASES[name]
    furnish(here, case)
    checked = lora("check", "recipe.yaml", "--rows", "1")
    assert checked.code == 0, checked.err
    assert case.labels in checked.out
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    assert "verified: the adapter on disk" in done.err
    assert "LOAD REPORT" not in done.err
    assert "Warning" not in done.err
    if case.task != "seq2seq-lm":
        assert re.search(r"^new head: \w+", done.err, re.MULTILINE)
    measured = lora("eval", "runs/a")
    assert measured.code == 0, measured.err
    assert "Warning" not in measured.err
    assert " ".join(measured.out.split("\n")[0].split()) == case.columns
    found = figures(measured.out)
    last = json.loads((here / "runs/a/metrics.jsonl").read_text().splitlines()[-1])
    assert float(found["adapter"][0]) == pytest.approx(last["eval_loss"], abs=1e-4)
    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert (merged.code, merged.out) == (0, "merged\n"), merged.err
    assert "Warning" not in merged.err

    # Plain transformers has the merged model, plain PEFT the adapter: they say the same.
    classes = case.task != "seq2seq-lm"
    labels = json.loads((here / "runs/a/adapter/labels.json").read_text()) if classes else None
    loader, options = LOADERS[case.task], {"num_labels": len(labels["names"])} if labels else {}
    alone = loader.from_pretrained("merged").eval()
    base = loader.from_pretrained("base", pad_token_id=alone.config.pad_token_id, **options)
    both = PeftModel.from_pretrained(base, "runs/a/adapter").eval()
    if labels:
        assert alone.config.id2label == dict(enumerate(labels["names"]))
    ids = torch.tensor([[5, 9, 12, 7, 30, alone.config.eos_token_id or 3]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if not classes else {"input_ids": ids}
    with torch.no_grad():
        one, two = alone(**inputs).logits, both(**inputs).logits
    assert float((one - two).abs().max() / two.abs().max()) < 1e-5
    # Measured as a base of its own, the merged model has the adapter's figures.
    again = lora("eval", _recipe_on("merged"))
    assert again.code == 0, again.err
    as_numbers = [
        [float(re.sub(r"[%,]", "", cell)) for cell in row] for row in (figures(again.out)["base"], found["adapter"])
    ]
    assert as_numbers[0] == pytest.approx(as_numbers[1], rel=1e-3)


def test_a_classifier_becomes_a_graph_that_tells_the_same_labels_apart(here: Path, lora: Lora):
    furnish(here, CASES["classes"])
    assert lora("train", "recipe.yaml").code == 0
    done = lora("export", "runs/a", "--to", "onnx", "--out", "graph")
    assert done.code == 0, done.err
    assert "logits: verified" in done.err
    assert json.loads(Path("graph/config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    refused = lora("export", "runs/a", "--to", "gguf", "--out", "a.gguf")
    assert refused.last_two[0].startswith("error: --to gguf: seq-cls models are not supported")


def _recipe_on(base: str) -> str:
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    tree["model"]["path"], tree["output"] = base, "runs/none"
    Path("again.yaml").write_text(yaml.safe_dump(tree))
    return "again.yaml"


def test_rows_that_lack_a_label_are_measured_with_the_trained_heads(here: Path, lora: Lora):
    furnish(here, CASES["classes"])
    assert lora("train", "recipe.yaml").code == 0
    rows = [{"text": "the fox jumps", "label": "yes"}, {"text": "a fox answer", "label": "yes"}]
    Path("yes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lora("eval", "runs/a", "--data", "yes.jsonl")
    assert done.code == 0, done.err
    Path("new.jsonl").write_text(json.dumps({"text": "the fox", "label": "perhaps"}) + "\n")
    assert lora("eval", "runs/a", "--data", "new.jsonl").last_two == [
        "error: new.jsonl:1: label perhaps: not one of the model's 2 labels",
        "hint: these are no, yes: fix the row, or add the label to data.labels",
    ]


def test_adapters_whose_numbers_stand_for_other_labels_are_not_measured_side_by_side(here: Path, lora: Lora):
    furnish(here, CASES["classes"])
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
def test_starts_from_activations_where_a_layer_sees_one_vector_a_row(method: str, here: Path, lora: Lora):
    furnish(here, CASES["classes"])
    done = lora("train", "recipe.yaml", "--set", f"adapter.method={method}")
    said = {
        "eva": [
            "error: adapter.method: eva needs 8 vectors of a batch, twice the rank, and bert.pooler.dense sees 4",
            "hint: leave it out: adapter.exclude_modules: [pooler.dense], or raise training.batch_size",
        ],
        "corda": [
            "error: adapter.method: corda needs layers that see every token, and one of them sees one vector a row: "
            "a pooler",
            "hint: leave it out: adapter.exclude_modules: [pooler.dense]",
        ],
    }
    assert done.last_two == said[method]
    without = ("--set", "adapter.exclude_modules=[pooler.dense]", "--fresh")
    again = lora("train", "recipe.yaml", "--set", f"adapter.method={method}", *without)
    assert again.code == 0, again.err


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_virtual_tokens_before_a_model_that_calls_its_sizes_otherwise(method: str, here: Path, lora: Lora):
    furnish(here, CASES["classes of pairs by number"])  # DistilBERT
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    tree["adapter"] = {"method": method, "virtual_tokens": 4}
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    assert lora("train", "recipe.yaml", "--set", "adapter.method=prefix", "--fresh").last_two == [
        "error: adapter.method: prefix tuning needs a key/value cache, which distilbert models do not have",
        "hint: write method: prompt or lora",
    ]


def test_a_regression_of_one_row_has_no_correlation(here: Path, lora: Lora):
    furnish(here, CASES["a number"])
    assert lora("train", "recipe.yaml").code == 0
    Path("one.jsonl").write_text(json.dumps({"text": "the fox", "text_pair": "a dog", "label": 0.5}) + "\n")
    done = lora("eval", "runs/a", "--data", "one.jsonl", "--json", "out.json")
    assert done.code == 0, done.err
    assert json.loads(Path("out.json").read_text())["results"]["adapter"].keys() == {"loss", "accuracy", "tokens"}


def test_labels_with_leading_zeros_are_names(here: Path, lora: Lora):
    furnish(here, CASES["classes"])
    texts = [json.loads(line)["text"] for line in Path("rows.jsonl").read_text().splitlines()]
    rows = [{"text": text, "label": ["01", "02"][i % 2]} for i, text in enumerate(texts)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = lora("check", "recipe.yaml")
    assert "2 labels: 01, 02" in checked.out, checked.err


def test_a_classifier_goes_on_learning_with_its_own_labels(here: Path, lora: Lora):
    """The labels of the base's head keep their numbers, though the rows would be sorted otherwise."""
    furnish(here, CASES["classes"])
    model = AutoModelForSequenceClassification.from_pretrained("base", id2label={0: "yes", 1: "no"}, label2id={})
    model.save_pretrained("base")
    done = lora("train", "recipe.yaml")
    assert done.code == 0, done.err
    assert "2 labels: yes, no" in done.err
    assert "new head" not in done.err
    assert json.loads(Path("runs/a/adapter/labels.json").read_text())["names"] == ["yes", "no"]
    done = lora("train", "recipe.yaml", "--fresh", "--set", "data.labels=[no, yes, maybe]")
    assert done.code == 0, done.err
    assert "new head in place of one for other labels: classifier, 195 parameters" in done.err


def test_resuming_a_classifier_is_the_uninterrupted_run(here: Path, lora: Lora):
    furnish(here, CASES["several classes"])
    assert lora("train", "recipe.yaml", "--output", "runs/whole").code == 0
    half = ("--set", "training.max_steps=4", "--output", "runs/half")
    assert lora("train", "recipe.yaml", *half).code == 0
    folder = Path("runs/half/checkpoints")
    for file in sorted((folder / "step-00000004").iterdir()):
        file.unlink()
    (folder / "step-00000004").rmdir()
    done = lora("train", "recipe.yaml", *half, "--resume")
    assert "resuming after step 2" in done.err
    files = [Path("runs", run, "adapter/adapter_model.safetensors").read_bytes() for run in ("whole", "half")]
    assert files[0] == files[1]


def test_an_encoder_that_counts_positions_from_behind_the_padding_has_fewer_than_it_says(here: Path, lora: Lora):
    """RoBERTa's table of 514 positions serves 512 tokens; one more is an index error in the middle of a run."""
    furnish(here, CASES["several classes"])
    config = json.loads(Path("base/config.json").read_text())
    rows = [{"text": "fox " * 600, "label": ["fox"]}, {"text": "dog " * 3, "label": ["dog"]}] * 8
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["max_position_embeddings"] = 512 + config["pad_token_id"] + 1
    families.write(
        families.FAMILIES["roberta"]._replace(
            options={key: config[key] for key in ("max_position_embeddings", "pad_token_id", "vocab_size")}
        ),
        here / "base",
    )
    wide = ("--set", "data.overlong=truncate", "--set", "training.max_steps=1", "--set", "data.max_length=")
    assert lora("train", "recipe.yaml", *wide[:-1], wide[-1] + "513").last_two == [
        "error: data.max_length: 513 tokens, but the model has positions for 512",
        "hint: at most 512",
    ]
    done = lora("train", "recipe.yaml", *wide[:-1], wide[-1] + "512")
    assert done.code == 0, done.err
    assert "rows truncated to data.max_length" in done.err
