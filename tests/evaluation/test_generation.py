"""Greedy answers: each prompt in a padded batch gets what it would get alone, cut at its stop token."""

import numpy as np
import pytest
import torch

from lora_cli.data.dataset import Row
from lora_cli.evaluation.generation import generate, prompt_ids, reference_ids, stop_ids
from lora_cli.recipe.schema import GenerationSpec
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

GREEDY = GenerationSpec()
TOKENIZER = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)


@torch.no_grad()
def alone(model: torch.nn.Module, prompt: list[int], *, limit: int, stop: list[int]) -> tuple[list[int], bool]:
    """The definition: the most likely next token, again and again, nothing cached, nothing padded."""
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
    model.generation_config.repetition_penalty = 2.0  # as chat models ship it; not what greedy means here
    prompts = [list(range(5, 5 + n)) for n in (1, 9, 4, 17)]
    # A stop that some of them reach: the third token of the second answer.
    free, _ = alone(model, prompts[1], limit=12, stop=[])
    stop = [free[2], TOKENIZER.eos_token_id]
    expected = [alone(model, prompt, limit=12, stop=stop) for prompt in prompts]
    assert {finished for _, finished in expected} == {True, False}
    answers = generate(model.train(training), TOKENIZER, prompts, spec=GREEDY, max_new_tokens=12, stop=stop)
    assert [(a.text, a.finished) for a in answers] == [
        (TOKENIZER.decode(ids, skip_special_tokens=True).strip(), finished) for ids, finished in expected
    ]
    assert model.training is training


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
def test_beams_are_transformers_own_for_each_prompt_alone(penalty: float):
    model = zoo.make("llama", vocab_size=len(TOKENIZER), attention="sdpa")
    prompts, stop = [list(range(5, 5 + n)) for n in (1, 9, 4)], [TOKENIZER.eos_token_id]
    spec = GenerationSpec.model_validate({"num_beams": 4, "length_penalty": penalty, "no_repeat_ngram": 2})
    answers = generate(model, TOKENIZER, prompts, spec=spec, max_new_tokens=10, stop=stop)
    for prompt, found in zip(prompts, answers, strict=True):
        options = {"num_beams": 4, "length_penalty": penalty, "no_repeat_ngram_size": 2, "max_new_tokens": 10}
        ids = model.generate(torch.tensor([prompt]), eos_token_id=stop, pad_token_id=0, do_sample=False, **options)[0]
        ids = [token for token in ids[len(prompt) :].tolist() if token not in (*stop, 0)]
        assert found.text == TOKENIZER.decode(ids, skip_special_tokens=True).strip()
    greedy = generate(model, TOKENIZER, prompts, spec=GREEDY, max_new_tokens=10, stop=stop)
    assert [a.text for a in greedy] != [a.text for a in answers]


def test_only_end_marks_stop_an_answer():
    model = zoo.make("llama", vocab_size=len(TOKENIZER))
    end, start, word = *TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]), TOKENIZER("a")["input_ids"][0]
    for of_model, marks in ((2, {2}), ([2, 7], {2, 7}), (None, set())):
        model.generation_config.eos_token_id = of_model
        assert set(stop_ids(TOKENIZER, model, [[start, word], [word, end]])) == {end, *marks}
    blank = build("<|im_start|>", eos="<|im_end|>", template=CHATML)
    blank.eos_token = None
    assert stop_ids(blank, model, [[3, 4]]) == []
    assert not generate(model, blank, [[5, 6]], spec=GREEDY, max_new_tokens=3, stop=[])[0].finished


@pytest.mark.parametrize(
    ("supervised", "prompt", "reference"),
    [
        ([0, 0, 1, 1, 1], [10, 11], [12, 13, 14]),
        ([0, 1, 1, 0, 1], [10], [11, 12]),  # the first answer of several
        ([1, 1, 1, 1, 1], [], [10, 11, 12, 13, 14]),
        ([0, 0, 0, 0, 1], [10, 11, 12, 13], [14]),
    ],
)
def test_prompt_and_reference_are_cut_at_the_labels(supervised: list[int], prompt: list[int], reference: list[int]):
    ids = np.arange(10, 15, dtype=np.int32)
    row = Row(ids, np.where(np.array(supervised) == 1, ids, -100).astype(np.int32), "rows.jsonl:1")
    assert (prompt_ids(row), reference_ids(row)) == (prompt, reference)
