"""New tokens and trainable tokens: check, train, eval and merge, with tied and untied embeddings and head."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands.conftest import Lora, WriteRecipe
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

NEW = ["<tool>", "</tool>"]
TRAINED = [*NEW, "<|im_end|>"]
SECTIONS: dict[str, Any] = {"model.new_tokens": NEW, "adapter.trainable_tokens": TRAINED, "adapter.dropout": 0.0}


@pytest.fixture(params=["tied", "untied"])
def head(request: pytest.FixtureRequest, workdir: Path, recipe: WriteRecipe) -> str:
    """Write a base with a tied or untied head, and rows that contain the new tokens; return "tied" or "untied"."""
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    Path("base").unlink()
    model = zoo.make("llama", vocab_size=len(tokenizer), tie_word_embeddings=request.param == "tied")
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [
        [{"role": "user", "content": f"add {i}"}, {"role": "assistant", "content": f"<tool>{i}+1</tool> is {i + 1}"}]
        for i in range(20)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe(SECTIONS)
    return str(request.param)


def test_new_and_trainable_tokens_are_trained_saved_and_merged(head: str, lora: Lora):
    checked = lora("check", "recipe.yaml", "--rows", "1")
    assert checked.code == 0, checked.err
    assert "[[<tool>" in checked.out
    result = lora("train", "recipe.yaml")
    assert result.code == 0, result.err
    assert "verified: the adapter on disk" in result.err

    tokenizer = AutoTokenizer.from_pretrained("runs/a/adapter")
    ids = tokenizer.convert_tokens_to_ids(TRAINED)
    assert tokenizer.encode("<tool>5") == [ids[0], *tokenizer.encode("5")]
    config = json.loads(Path("runs/a/adapter/adapter_config.json").read_text())
    indices = config["trainable_token_indices"]
    assert indices == (ids if head == "tied" else {"model.embed_tokens": ids, "lm_head": ids})
    saved = load_file("runs/a/adapter/adapter_model.safetensors")
    token_rows = {name: t for name, t in saved.items() if "lora_" not in name}
    # Only the rows of the trainable tokens are saved, not the matrix of the full vocabulary.
    assert {tuple(t.shape) for t in token_rows.values()} == {(3, 64)}
    assert len(token_rows) == (1 if head == "tied" else 2)
    # Each row differs from its initial value: the mean of all rows for a new token, else the base's row.
    base = AutoModelForCausalLM.from_pretrained("base")
    before = base.get_input_embeddings().weight
    for tensor in token_rows.values():
        if head == "tied" or "embed" in next(name for name in token_rows if token_rows[name] is tensor):
            start = torch.stack([before.mean(0), before.mean(0), before[ids[2]]])
            assert ((tensor - start).abs().amax(dim=1) > 1e-3).all()
    card = Path("runs/a/adapter/README.md").read_text()
    assert "Its tokenizer adds `<tool>`, `</tool>` to the base's tokens." in card

    measured = lora("eval", "runs/a", "--answers", "1")
    assert measured.code == 0, measured.err
    last = json.loads(Path("runs/a/metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['eval_loss']:.4f}" in measured.out

    merged = lora("merge", "runs/a/adapter", "--out", "merged")
    assert merged.code == 0, merged.err
    merged_model = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert merged_model.config.vocab_size == len(AutoTokenizer.from_pretrained("merged")) == len(tokenizer)
    assert merged_model.config.tie_word_embeddings is (head == "tied")
    # The merged model equals the adapter loaded with plain PEFT, as its model card describes.
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    peft_model = PeftModel.from_pretrained(base, "runs/a/adapter").eval()
    text = torch.tensor([tokenizer.encode("<tool>5</tool> is<|im_end|>")])
    with torch.no_grad():
        assert zoo.relative(merged_model(text).logits, peft_model(text).logits) < 1e-5


def test_a_resumed_run_with_trainable_tokens_equals_the_uninterrupted_run(head: str, lora: Lora):
    assert lora("train", "recipe.yaml", "--output", "runs/complete").code == 0
    assert lora("train", "recipe.yaml", "--output", "runs/resumed").code == 0
    newest = Path("runs/resumed/checkpoints/step-00000004")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    result = lora("train", "recipe.yaml", "--output", "runs/resumed", "--resume")
    assert "resuming after step 2" in result.err
    files = [Path("runs", run, "adapter/adapter_model.safetensors").read_bytes() for run in ("complete", "resumed")]
    assert files[0] == files[1]


def test_tokens_that_cannot_be_trained_are_refused(head: str, recipe: WriteRecipe, lora: Lora):
    recipe({**SECTIONS, "model.new_tokens": ["<|im_start|>", *NEW], "adapter.trainable_tokens": ["<|im_start|>", *NEW]})
    assert lora("check", "recipe.yaml").last_two == [
        "error: model.new_tokens: the tokenizer already has <|im_start|>",
        "hint: remove it from the list: it is not new",
    ]
    recipe({**SECTIONS, "adapter.trainable_tokens": [*NEW, "two words"]})
    refused = lora("check", "recipe.yaml")
    assert refused.code == 2
    assert refused.last_two[0].startswith("error: adapter.trainable_tokens: 'two words' is ")
    assert refused.last_two[0].endswith(" tokens to this tokenizer, not one")
    recipe({**SECTIONS, "adapter.trainable_tokens": None, "adapter.modules_to_save": ["norm"]})
    for command in ("check", "train"):
        assert lora(command, "recipe.yaml").last_two == [
            f"error: model.new_tokens: {NEW[0]!r} is not trainable: adapter.modules_to_save does not have "
            "model.embed_tokens",
            "hint: add embed_tokens to it, and the head if it is not tied; or list the token in "
            "adapter.trainable_tokens",
        ]


def test_trainable_tokens_of_a_head_with_a_bias_are_refused():
    from lora_cli.errors import LoraError
    from lora_cli.model.adapter_context import AdapterContext

    model = zoo.make("llama")
    model.set_output_embeddings(torch.nn.Linear(64, zoo.VOCABULARY))
    with pytest.raises(LoraError, match="lm_head has a bias") as caught:
        zoo.attached(model, trainable_tokens=["a"], context=AdapterContext(encode=lambda text: [5]))
    assert "modules_to_save: [model.embed_tokens, lm_head]" in str(caught.value.hint)
