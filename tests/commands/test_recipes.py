"""Every recipe of configs/ with check, train, eval and merge, on a tiny random model of its architecture."""

import json
import random
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lora_cli.commands.init import recipes
from lora_cli.training import cpu
from tests.commands.conftest import Lora
from tests.inputs.chat_models import MODELS
from tests.inputs.tiny_tokenizers import (
    CHATML,
    GEMMA,
    LLAMA3,
    build,
    build_encoder,
    build_sentencepiece,
)
from tests.inputs.tiny_tokenizers import MISTRAL as MISTRAL_TEMPLATE
from tests.model import families

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "scripts"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France?",
    "Paris is the capital.",
    "Hello, how are you?",
    "I am fine, and the answer is forty two.",
]

Build = Callable[[], PreTrainedTokenizerFast]


def chatml() -> PreTrainedTokenizerFast:
    return build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


def llama3() -> PreTrainedTokenizerFast:
    special = ("<|start_header_id|>", "<|end_header_id|>")
    return build(*special, eos="<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True, template=LLAMA3)


# For each recipe, a tiny model of its architecture and a tokenizer of the same kind.
ROBERTA = families.FAMILIES["roberta"]._replace(options={"max_position_embeddings": 514})
BASES: dict[str, tuple[families.Family, Build]] = {
    "falcon7b-qlora": (families.FAMILIES["falcon"], lambda: build(eos="<|endoftext|>")),
    "guanaco": (families.FAMILIES["llama"], lambda: build_sentencepiece("")),
    "llama3.1-8b": (families.FAMILIES["llama"], llama3),
    "qwen3-8b": (
        families.FAMILIES["qwen3"]._replace(options={"head_dim": 32}),
        MODELS["qwen3"].tokenizer,
    ),
    "mistral-7b": (families.FAMILIES["mistral"], lambda: build_sentencepiece(MISTRAL_TEMPLATE)),
    "gemma3-1b": (
        families.FAMILIES["gemma3"],
        lambda: build("<start_of_turn>", "<end_of_turn>", eos="<eos>", bos="<bos>", adds_bos=True, template=GEMMA),
    ),
    "phi3-mini": (families.FAMILIES["phi3"], MODELS["phi3"].tokenizer),
    "gpt2-medium-e2e": (families.FAMILIES["gpt2"], lambda: build(eos="<|endoftext|>", bos="<|endoftext|>")),
    "roberta-glue": (ROBERTA, lambda: build_encoder("roberta")),
    "smollm2": (families.FAMILIES["llama"], chatml),
    "quickstart": (families.FAMILIES["llama"], chatml),
}

# Columns and class names of the tasks, as in the dataset on the hub.
GLUE: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "cola": (("sentence",), ["unacceptable", "acceptable"]),
    "sst2": (("sentence",), ["negative", "positive"]),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"]),
    "stsb": (("sentence1", "sentence2"), []),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"]),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"]),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"]),
    "rte": (("sentence1", "sentence2"), ["entailment", "not_entailment"]),
}


def load_fake_dataset(path: str, subset: str | None = None, *, split: str | None = None) -> Any:
    """Return random rows with the columns of the hub dataset of this name, because tests cannot reach the hub."""
    import datasets

    rng = random.Random(f"{path} {subset} {split}")
    texts = [" ".join(rng.choices(SENTENCES, k=rng.randint(1, 3))) for _ in range(40)]
    features = None
    match path:
        case "timdettmers/openassistant-guanaco":
            assert subset is None
            rows = [{"text": f"### Human: {text}### Assistant: {rng.choice(SENTENCES)}"} for text in texts]
        case "databricks/databricks-dolly-15k":
            assert subset is None
            rows = [
                {
                    "instruction": text,
                    "context": rng.choice(["", *SENTENCES]),
                    "response": text[::-1],
                    "category": "qa",
                }
                for text in texts
            ]
        case "nyu-mll/glue":
            assert subset is not None
            assert split in ("train", "validation_matched" if subset == "mnli" else "validation")
            columns, names = GLUE[subset]
            rows = [
                {
                    **{column: rng.choice(texts) for column in columns},
                    "label": rng.randrange(len(names)) if names else rng.uniform(0, 5),
                    "idx": number,
                }
                for number in range(40)
            ]
            label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
            text_features = {column: datasets.Value("string") for column in columns}
            features = datasets.Features({**text_features, "label": label, "idx": datasets.Value("int32")})
        case _:
            raise AssertionError(path)
    dataset = datasets.Dataset.from_list(rows, features=features)
    return dataset if split else datasets.DatasetDict({"train": dataset})


def write_local_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the local files of the other recipes, in the way that their comments describe."""
    Path("data").mkdir()
    turns = [[{"role": "user", "content": s}, {"role": "assistant", "content": s[::-1]}] for s in SENTENCES * 8]
    Path("data/quickstart.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    for split in ("train", "valid"):
        lines = [f"name : {split} {i} | area : {SENTENCES[i % 5]}||{SENTENCES[i % 3]} \n" for i in range(24)]
        Path(f"{split}.txt").write_text("".join(lines))
        script = str(SCRIPTS / "make_e2e_data.py")
        monkeypatch.setattr("sys.argv", [script, f"{split}.txt", f"data/e2e/{split}.jsonl"])
        runpy.run_path(script, run_name="__main__")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes the tiny base of a recipe, once for all recipes that share it."""
    root = tmp_path_factory.mktemp("bases")

    def base_of(name: str) -> Path:
        key = max((key for key in BASES if name.startswith(key)), key=len)
        folder = root / key
        if not folder.exists():
            family, tokenizer = BASES[key][0], BASES[key][1]()
            ids = {
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id or 0,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
            }
            if key == "roberta-glue":
                ids["pad_token_id"] = 1  # as in the real RoBERTa, whose positions start after the id of the padding
            families.write(family._replace(options={**family.options, **ids}), folder)
            tokenizer.save_pretrained(folder)
        return folder

    return base_of


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_checked_trained_measured_and_merged(
    name: str,
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: Lora,
):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "available_cores", lambda: 1)
    monkeypatch.setattr(datasets, "load_dataset", load_fake_dataset)
    write_local_rows(monkeypatch)
    assert lora("init", name).code == 0
    changes = [f"model.path={bases(name)}", "training.epochs=null", "training.max_steps=2", "training.warmup=0"]
    if name.startswith("guanaco"):
        # Its paged optimizer is refused on a machine without a GPU, so another one is set.
        refused = lora("check", f"{name}.yaml", "--set", changes[0])
        assert refused.code == 2
        assert refused.last_two[0].startswith("error: training.optimizer: paged-adamw pages between a CUDA GPU and")
        changes.append("training.optimizer=adamw")
    arguments = [argument for change in changes for argument in ("--set", change)]
    checked = lora("check", f"{name}.yaml", *arguments)
    assert checked.code == 0, checked.err
    assert "dropped" not in checked.out
    result = lora("train", f"{name}.yaml", *arguments)
    assert result.code == 0, result.err
    assert "Warning" not in result.err
    assert "verified: the adapter on disk" in result.err
    run = Path("runs") / name
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("learning_rate" in step for step in steps) == 2
    measured = lora("eval", run, "--answers", "1")
    assert measured.code == 0, measured.err
    assert re.search(r"^ *adapter +[\d.]+", measured.out, re.MULTILINE), measured.out
    merged = lora("merge", run / "adapter", "--out", "merged")
    assert (merged.code, merged.out) == (0, "merged\n"), merged.err
    assert "verified: every weight, read back, equals PEFT's merge" in merged.err
