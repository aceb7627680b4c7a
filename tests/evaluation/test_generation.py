"""Batched generation: each prompt in a padded batch gets the same answer as alone, cut at its stop token."""

import numpy as np
import pytest
import torch

from lora_cli.data.encoded_rows import Row
from lora_cli.evaluation.generation import generate, prompt_ids, reference_ids, stop_ids
from lora_cli.recipe.schema import GenerationSpec
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

GREEDY = GenerationSpec()
TOKENIZER = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], *, limit: int, stop: list[int]) -> tuple[list[int], bool]:
    """Greedy decoding by its definition, one token at a time, without cache and padding."""
    ids = list(prompt)
    for _ in range(limit):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


@pytest.mark.parametrize(("family", "training"), [("llama", True), ("llama", False), ("gpt2", False)])
def test_a_batch_answers_as_each_prompt_alone(family: str, training: bool):
    model = zoo.make(family, vocab_size=len(TOKENIZER), attention="sdpa")
    model.generation_config.repetition_penalty = 2.0  # as some chat models ship it; must have no effect here
    prompts = [list(range(5, 5 + n)) for n in (1, 9, 4, 17)]
    # A stop token that some answers reach: the third token of the second answer.
    without_stop, _ = greedy(model, prompts[1], limit=12, stop=[])
    stop = [without_stop[2], TOKENIZER.eos_token_id]
    expected = [greedy(model, prompt, limit=12, stop=stop) for prompt in prompts]
    assert {finished for _, finished in expected} == {True, False}
    answers = generate(model.train(training), TOKENIZER, prompts, spec=GREEDY, max_new_tokens=12, stop=stop)
    assert [(a.text, a.finished) for a in answers] == [
        (TOKENIZER.decode(ids, skip_special_tokens=True).strip(), finished) for ids, finished in expected
    ]
    assert model.training is training


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_generation_config_is_the_models_own_again(family: str, fails: bool, method: str):
    model = zoo.attached(zoo.make(family, vocab_size=len(TOKENIZER), attention="sdpa"), method=method)
    own = model.get_base_model().generation_config
    prompts = [[-1 if fails else 5, 6, 7]]  # no token has this id
    try:
        generate(model, TOKENIZER, prompts, spec=GREEDY, max_new_tokens=3, stop=[])
    except IndexError:
        assert fails
    assert model.get_base_model().generation_config is own
    assert model.generation_config is own


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_beam_search_equals_transformers_for_each_prompt_alone(penalty: float):
    model = zoo.make("llama", vocab_size=len(TOKENIZER), attention="sdpa")
    prompts, stop = [list(range(5, 5 + n)) for n in (1, 9, 4)], [TOKENIZER.eos_token_id]
    spec = GenerationSpec.model_validate({"num_beams": 4, "length_penalty": penalty, "no_repeat_ngram": 2})
    answers = generate(model, TOKENIZER, prompts, spec=spec, max_new_tokens=10, stop=stop)
    for prompt, answer in zip(prompts, answers, strict=True):
        options = {"num_beams": 4, "length_penalty": penalty, "no_repeat_ngram_size": 2, "max_new_tokens": 10}
        ids = model.generate(torch.tensor([prompt]), eos_token_id=stop, pad_token_id=0, do_sample=False, **options)[0]
        ids = [token for token in ids[len(prompt) :].tolist() if token not in (*stop, 0)]
        assert answer.text == TOKENIZER.decode(ids, skip_special_tokens=True).strip()
    greedy_answers = generate(model, TOKENIZER, prompts, spec=GREEDY, max_new_tokens=10, stop=stop)
    assert [a.text for a in greedy_answers] != [a.text for a in answers]


def test_only_eos_and_special_tokens_stop_an_answer():
    model = zoo.make("llama", vocab_size=len(TOKENIZER))
    end, start, word = *TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]), TOKENIZER("a")["input_ids"][0]
    for model_eos, expected in ((2, {2}), ([2, 7], {2, 7}), (None, set())):
        model.generation_config.eos_token_id = model_eos
        assert set(stop_ids(TOKENIZER, model, [[start, word], [word, end]])) == {end, *expected}
    without_eos = build("<|im_start|>", eos="<|im_end|>", template=CHATML)
    without_eos.eos_token = None
    assert stop_ids(without_eos, model, [[3, 4]]) == []
    assert not generate(model, without_eos, [[5, 6]], spec=GREEDY, max_new_tokens=3, stop=[])[0].finished


@pytest.mark.parametrize(
    ("supervised", "prompt", "reference"),
    [
        ([0, 0, 1, 1, 1], [10, 11], [12, 13, 14]),
        ([0, 1, 1, 0, 1], [10], [11, 12]),  # the first answer of several
        ([1, 1, 1, 1, 1], [], [10, 11, 12, 13, 14]),
        ([0, 0, 0, 0, 1], [10, 11, 12, 13], [14]),
    ],
)
def test_prompt_and_reference_are_split_at_the_labels(supervised: list[int], prompt: list[int], reference: list[int]):
    ids = np.arange(10, 15, dtype=np.int32)
    row = Row(ids, np.where(np.array(supervised) == 1, ids, -100).astype(np.int32), "rows.jsonl:1")
    assert (prompt_ids(row), reference_ids(row)) == (prompt, reference)
