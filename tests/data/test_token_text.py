"""The text of each token: whole characters, spaces, borders of the label mask between characters, escaped bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from lora_cli.data.dataset import show_mask
from lora_cli.data.token_text import BYTE_OF_LETTER, token_texts
from tests.data.conftest import Prepare
from tests.inputs.tiny_tokenizers import CHATML, build, build_sentencepiece

BYTE_LEVEL = build("<|im_start|>", eos="<|im_end|>", template=CHATML)
TEXTS = {
    "Chinese": "你好，世界。",
    "emoji": "a👩\u200d👧 b🇫🇷",
    "Cyrillic": "Привет, мир",
    "combining": "e\u0301 ñ",
    "replacement": "a\ufffdb",
    "mixed": "<|im_start|>user\nкак 好\r\n<|im_end|>\n",
}


def sentencepiece() -> PreTrainedTokenizerFast:
    tokenizer = build_sentencepiece(CHATML)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


SENTENCEPIECE = sentencepiece()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_character_is_whole(text: str):
    ids = BYTE_LEVEL(text)["input_ids"]
    texts = token_texts(ids, BYTE_LEVEL)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


@given(st.text())
def test_the_texts_of_all_tokens_are_the_text(text: str):
    # A tokenizer file cannot have lone surrogates, and neither has JSON text that was decoded strictly.
    text = text.encode(errors="ignore").decode()
    assert "".join(token_texts(BYTE_LEVEL(text)["input_ids"], BYTE_LEVEL)) == text


@pytest.mark.parametrize("text", ["is the answer", "мир the 世界 answer", "line one\n\nline two"])
def test_byte_fallback_and_spaces_of_sentencepiece(text: str):
    texts = token_texts(SENTENCEPIECE(text, add_special_tokens=False)["input_ids"], SENTENCEPIECE)
    assert "".join(texts) == text
    assert " the" in texts or "the" not in text


def test_a_border_of_the_loss_is_between_the_characters(prepared: Prepare):
    row = json.dumps({"prompt": "问题", "completion": "好👍"})
    mask = show_mask(prepared(BYTE_LEVEL, files={"train.jsonl": row}).train[0], BYTE_LEVEL)
    assert "".join(text for text, supervised in mask if not supervised) == "问题"
    assert "".join(text for text, supervised in mask if supervised) == "好👍<|im_end|>"


@pytest.mark.parametrize("cut", [1, 2])
def test_bytes_of_a_character_that_is_cut_are_escaped(cut: int):
    ids = BYTE_LEVEL("a世")["input_ids"]
    assert len(ids) == 4
    escaped = "".join(f"\\x{byte:02x}" for byte in "世".encode()[:cut])
    assert "".join(token_texts(ids[: 1 + cut], BYTE_LEVEL)) == f"a{escaped}"
    rest = "".join(f"\\x{byte:02x}" for byte in "世".encode()[cut:])
    assert token_texts(ids[1 + cut :], BYTE_LEVEL)[0] == rest[:4]


def test_a_token_that_ends_one_character_and_begins_the_next():
    plain = json.loads(BYTE_LEVEL.backend_tokenizer.to_str())
    letters = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    number = BYTE_LEVEL.vocab_size + 10
    plain["model"]["vocab"]["".join(letters[byte] for byte in "世界".encode()[2:4])] = number
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)))
    bytes_ = BYTE_LEVEL("世界")["input_ids"]
    assert token_texts([*bytes_[:2], number, *bytes_[4:]], tokenizer) == ["世", "", "界", "", ""]
