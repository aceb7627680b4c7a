"""While answers are generated, the model has an attention for padding; afterwards its own again."""

import pytest
import torch

from lora_cli.evaluation.answers import Prompt, generate_answers
from lora_cli.model.packed_attention import PACKED_ATTENTION
from lora_cli.model.padded_attention import PADDED_ATTENTION
from lora_cli.recipe.schema import GenerationSpec
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

TOKENIZER = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
PROMPTS = [Prompt(f"rows.jsonl:{n}", list(range(5, 5 + n)), "", ["a"], 3, [[6, 7]]) for n in (3, 8)]


@pytest.mark.parametrize(
    ("attention", "used"), [(PACKED_ATTENTION, "sdpa"), (PADDED_ATTENTION, "sdpa"), ("eager", "eager")]
)
def test_the_attention_is_the_models_own_again_after_generation(attention: str, used: str):
    model = zoo.make("llama", vocab_size=len(TOKENIZER), attention=attention)
    seen: set[str] = set()
    model.register_forward_pre_hook(lambda module, _: seen.add(module.config._attn_implementation))
    answers = generate_answers(model, TOKENIZER, PROMPTS, spec=GenerationSpec(), seed=0)
    assert len(answers) == len(PROMPTS)
    assert (seen, model.config._attn_implementation) == ({used}, attention)


def test_the_attention_is_the_models_own_again_after_an_error():
    model = zoo.make("llama", vocab_size=len(TOKENIZER), attention=PACKED_ATTENTION)
    without_embedding = [PROMPTS[0]._replace(ids=[-1])]
    with torch.no_grad(), pytest.raises(IndexError):
        generate_answers(model, TOKENIZER, without_embedding, spec=GenerationSpec(), seed=0)
    assert model.config._attn_implementation == PACKED_ATTENTION
