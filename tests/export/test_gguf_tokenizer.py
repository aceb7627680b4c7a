"""The tokenizer in a GGUF file: llama.cpp gives the same token ids as transformers, and stops at the model's EOS."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_cli.errors import LoraError
from lora_cli.export.gguf import llama_cpp_server, pre_tokenizers
from lora_cli.export.gguf.llama_cpp_server import LlamaCpp
from lora_cli.export.gguf.tokenizer import GGUFVocabulary, add_to_writer, convert_tokenizer
from tests.export.tokenizer_kinds import (
    BYTE_LEVEL,
    BYTES,
    BYTES_ONLY,
    KINDS,
    LLAMA3,
    REPLACE,
    make_tokenizer,
    metaspace,
    sequence,
    split,
    train_byte_level,
    train_sentencepiece,
)
from tests.inputs.tiny_tokenizers import CHATML, build_encoder

pytestmark = pytest.mark.slow

# Texts that tokenizers are known to have trouble with.
HOSTILE = [
    "", " ", "  ", "   a", "a ", "a   ", "\n", "\n\n\n", "\t", " \n \n", "\r\n\r\n", "a\n\nb", "x \n",
    "\u00a0a", "a\u3000b",
    "0", "12", "123", "1234", "12345678901234567890", "1 2 3", "3.14 -1e5", "١٢٣", "²³", "½",
    "I'm", "I'M", "they'll've", "'s", "''", "don't's", "it´s", "O'Reilly", "'tis",
    "Hello, World!", "...", "!?!?", "a.b.c", "$9", "<html>", "</s", "a/b\\c", "``x``", "^^",
    "#include <x>\n",
    "Straße", "naïve", "привет Мир", "你好，世界。", "こんにちは", "한국어", "שלום עולם",
    "🙂", "👩‍👩‍👧", "a🙂b", "\u200b", "ﬁ",
    "camelCase HTTPServer ÀÉÎ éÀ", "a" * 300, " " * 70, "\n" * 40, "ab" * 100, "\x1f\x7f", "\ufffd", "▁", "a▁▁b",
    "<|im_end|>", "<|im_end|>\n<|im_start|>user\n", "a<|im_end|>b", " <|im_end|> ", "<|im_end", "<tool>x</tool>",
]  # fmt: skip
# Old characters of Unicode, of every class that some expression distinguishes.
CHARACTERS = (
    "aAbsStTdDmMlLvVrReE'’ \t\n\r.,;:!?-_/\\()[]{}<>|$+=^~`#%&*\""
    "0123456789éÉßñΩωЖжǅªʰ中文かナ한أع١²½Ⅷ🙂👩\u200d\u00a0\u3000\u2028\x0b"
)
PHRASES = [" the answer", "  12", "<|im_end|>", "<tool>", "'ll", "1234", "\n\n", "   ", "HTTPServer"]
TEXT = st.lists(st.sampled_from(CHARACTERS) | st.sampled_from(PHRASES), max_size=40).map("".join)


def convert(
    tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None, eos_ids: tuple[int, ...] = ()
) -> GGUFVocabulary:
    return convert_tokenizer(tokenizer, LlamaConfig(vocab_size=rows or len(tokenizer)), generation_eos=eos_ids)


def write_model(file: Path, vocabulary: GGUFVocabulary, *, name: str = "tiny") -> Path:
    """Write a model of one layer with this vocabulary; its weights are all ones."""
    rows, width = len(vocabulary.metadata["token_list"]), 32
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name(name)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    add_to_writer(vocabulary, writer)
    writer.add_tensor("token_embd.weight", np.ones((rows, width), np.float32))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(width, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", np.ones((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A kind of tokenizer, the tokenizer, and llama.cpp with its GGUF file."""
    tokenizer = make_tokenizer(request.param, chat_template=None)
    file = write_model(tmp_path_factory.mktemp("vocabulary") / "out.gguf", convert(tokenizer, rows=len(tokenizer) + 5))
    with llama_cpp_server.run_llama_cpp(file, vocab_size=len(tokenizer) + 5, context_length=64) as runtime:
        yield request.param, tokenizer, runtime


def assert_same_tokens(kind: str, tokenizer: PreTrainedTokenizerBase, runtime: LlamaCpp, text: str) -> None:
    for special in (False, True):
        expected = tokenizer(text, add_special_tokens=special)["input_ids"]
        assert runtime.tokenize(text, add_special=special) == expected, (kind, text)


def without_known_differences(kind: str, text: str) -> str:
    """Remove from `text` what llama.cpp tokenizes differently according to the notes."""
    if kind in ("always", "first"):
        for token in ("<|im_end|>", "<|im_start|>", "<tool>", "</tool>"):
            text = text.replace(token, "")
        text = text.lstrip(" ▁")
    if kind in ("tekken", "gpt-4o"):
        text = "".join(letter if letter.isascii() or letter.lower() == letter.upper() else "x" for letter in text)
    return text.replace("\u3000", "") if kind == "deepseek-llm" else text


def test_hostile_texts_have_the_same_tokens(pair: Any):
    kind, tokenizer, runtime = pair
    for text in HOSTILE:
        assert_same_tokens(kind, tokenizer, runtime, without_known_differences(kind, text))


@given(text=TEXT)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_the_same_tokens(pair: Any, text: str):
    kind, tokenizer, runtime = pair
    assert_same_tokens(kind, tokenizer, runtime, without_known_differences(kind, text))


def llama_cpp_ids(
    tokenizer: PreTrainedTokenizerBase, folder: Path, texts: list[str], **options: Any
) -> list[list[int]]:
    """Return llama.cpp's token ids of `texts`."""
    vocabulary = convert(tokenizer)
    with llama_cpp_server.run_llama_cpp(
        write_model(folder / "out.gguf", vocabulary, **options), vocab_size=len(tokenizer), context_length=64
    ) as runtime:
        return [runtime.tokenize(text) for text in texts]


def tokenizer_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_every_pre_tokenizer_is_tested_by_its_name():
    names = {name for entry in pre_tokenizers.PRE_TOKENIZERS.values() for name in entry if name}
    assert {name for _, _, name in BYTE_LEVEL.values()} == names
    for kind, (_, _, name) in BYTE_LEVEL.items():
        assert convert(make_tokenizer(kind)).metadata["tokenizer_pre"] == name


def test_ignore_merges_changes_the_name_of_the_pre_tokenizer():
    """Two names of llama.cpp differ only in `ignore_merges`. With a single name it must make no difference."""
    section, _, _ = BYTE_LEVEL["llama3"]
    assert convert(train_byte_level(section, ignore_merges=False)).metadata["tokenizer_pre"] == "smaug-bpe"
    assert convert(train_byte_level(BYTE_LEVEL["qwen2"][0], ignore_merges=True)).metadata["tokenizer_pre"] == "qwen2"
    plain = json.loads(train_byte_level(BYTE_LEVEL["qwen2"][0], ignore_merges=True).backend_tokenizer.to_str())
    plain["model"]["merges"] = plain["model"]["merges"][:-1]
    incomplete = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>")
    with pytest.raises(LoraError, match="ignore_merges"):
        convert(incomplete)


def test_the_demo_model_has_the_metadata_of_its_own_file(demo_folder: Path, demo_gguf: Path):
    tokenizer, config = AutoTokenizer.from_pretrained(demo_folder), AutoConfig.from_pretrained(demo_folder)
    writer = gguf.GGUFWriter("unused", "llama")
    add_to_writer(convert_tokenizer(tokenizer, config, generation_eos=[2]), writer)
    converted = {key: entry.value for key, entry in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    fields = gguf.GGUFReader(str(demo_gguf)).fields.items()
    original = {key: entry.contents() for key, entry in fields if key.startswith("tokenizer.")}
    # transformers made the folder from the file, and lost that digits are single words; no merge joins digits.
    assert converted.pop("tokenizer.ggml.pre") == "gpt-2"
    assert original.pop("tokenizer.ggml.pre") == "smollm"
    assert converted.pop("tokenizer.ggml.add_eos_token") is False  # llama.cpp's default for the kind
    assert converted == original


def test_the_demo_model_has_the_same_tokens(demo_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    assert llama_cpp_ids(tokenizer, tmp_path, HOSTILE) == tokenizer_ids(tokenizer, HOSTILE)


def test_rows_without_a_token_have_a_name_and_are_unused():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_tokens([f"[PAD{len(tokenizer) + 3}]"])
    size = len(tokenizer)
    vocabulary = convert(tokenizer, rows=size + 7)
    texts, types = vocabulary.metadata["token_list"], vocabulary.metadata["token_types"]
    assert len(texts) == len(types) == len(set(texts)) == size + 7
    assert {texts[number]: number for number in range(size)} == tokenizer.get_vocab()
    assert set(types[size:]) == {gguf.TokenType.UNUSED}
    assert gguf.TokenType.UNUSED not in types[:size]


def test_a_gap_in_the_ids_is_filled(tmp_path: Path):
    plain = json.loads(make_tokenizer("gpt2").backend_tokenizer.to_str())
    for entry in plain["added_tokens"]:
        entry["id"] += 3
        plain["model"]["vocab"][entry["content"]] = entry["id"]
    with_gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>")
    rows = max(with_gap.get_vocab().values()) + 1
    assert rows == len(with_gap) + 3
    vocabulary = convert(with_gap, rows=rows)
    assert vocabulary.metadata["token_types"].count(gguf.TokenType.UNUSED) == 3
    with llama_cpp_server.run_llama_cpp(
        write_model(tmp_path / "out.gguf", vocabulary), vocab_size=rows, context_length=64
    ) as runtime:
        for text in HOSTILE:
            assert_same_tokens("gpt2", with_gap, runtime, text)


def test_more_tokens_than_embeddings_are_refused():
    tokenizer = make_tokenizer("gpt2")
    with pytest.raises(
        LoraError, match=rf"up to {len(tokenizer) - 1}, but the model has {len(tokenizer) - 1} embeddings"
    ):
        convert(tokenizer, rows=len(tokenizer) - 1)


def test_token_types():
    for kind in ("gpt2", "llama2"):
        tokenizer = make_tokenizer(kind)
        metadata = convert(tokenizer).metadata
        types = dict(zip(metadata["token_list"], metadata["token_types"], strict=True))
        assert types["<|im_end|>"] == gguf.TokenType.CONTROL
        assert types["<tool>"] == gguf.TokenType.USER_DEFINED
        assert types["a"] == gguf.TokenType.NORMAL
        if kind == "llama2":
            assert types["<unk>"] == gguf.TokenType.UNKNOWN
            assert {types[text] for text in BYTES} == {gguf.TokenType.BYTE}


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_bos_and_eos_are_added_as_the_tokenizer_does(bos: str | None, options: dict[str, bool], tmp_path: Path):
    tokenizer = make_tokenizer("gpt2", bos=bos, **options)
    with llama_cpp_server.run_llama_cpp(
        write_model(tmp_path / "out.gguf", convert(tokenizer)), vocab_size=len(tokenizer), context_length=64
    ) as runtime:
        assert_same_tokens("gpt2", tokenizer, runtime, "Hello")
        # An option that is set on an existing tokenizer has no effect on its ids.
        tokenizer.init_kwargs["add_bos_token"] = not options
        assert convert(tokenizer).metadata["add_bos_token"] == (
            tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        )


def test_tokens_around_a_text_other_than_bos_and_eos_are_refused():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(text, tokenizer.convert_tokens_to_ids(text)) for text in ("<|im_start|>", "<|im_end|>")],
    )
    metadata = convert(tokenizer).metadata
    assert metadata["add_bos_token"]
    assert metadata["add_eos_token"]
    assert metadata["bos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_end|>"
    with pytest.raises(LoraError, match=r"begins a text with <\|im_start\|>"):
        convert(tokenizer)
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_start|>"
    with pytest.raises(LoraError, match=r"ends a text with <\|im_end\|>"):
        convert(tokenizer)


def tokenizer_with_tokens(*texts: str) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": list(texts)})
    return tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(texts)))


@pytest.mark.parametrize(
    "texts",
    [("<stop>",), ("<stop>", "<halt>"), ("<|eot_id|>", "<stop>", "<|end|>", "<halt>", "<|eom_id|>"), ("<|eot_id|>",)],
)
def test_llama_cpp_stops_at_every_eos_token(texts: tuple[str, ...], tmp_path: Path):
    tokenizer, ids = tokenizer_with_tokens(*texts)
    vocabulary = convert(tokenizer, eos_ids=ids)
    assert set(vocabulary.eos_ids) == {*ids, tokenizer.eos_token_id}
    after = tokenizer("The answer is")["input_ids"]
    with llama_cpp_server.run_llama_cpp(
        write_model(tmp_path / "out.gguf", vocabulary), vocab_size=len(tokenizer), context_length=64
    ) as runtime:
        for eos_id in vocabulary.eos_ids:
            assert runtime.stops_at(eos_id, after=after), tokenizer.convert_ids_to_tokens(eos_id)
        assert not runtime.stops_at(tokenizer.convert_tokens_to_ids("<tool>"), after=after)


def test_the_only_eos_may_be_the_models(tmp_path: Path):
    """A tokenizer without EOS: llama.cpp would use token 11."""
    tokenizer, ids = tokenizer_with_tokens("<stop>")
    tokenizer.eos_token = None
    vocabulary = convert(tokenizer, eos_ids=ids)
    assert vocabulary.metadata["eos_token_id"] == ids[0]
    with pytest.raises(LoraError, match="the model has no EOS token"):
        convert(tokenizer)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("<a>", "<b>", "<c>"), "the model has 4 EOS tokens; GGUF cannot store <c>"),
        (
            ("<|end|>", "<|return|>", "<|call|>"),
            "<.end.> is an EOS token of this model, but llama.cpp does not stop at it",
        ),
    ],
)
def test_eos_tokens_that_gguf_cannot_store_are_refused(texts: tuple[str, ...], message: str):
    tokenizer, ids = tokenizer_with_tokens(*texts)
    with pytest.raises(LoraError, match=message):
        convert(tokenizer, eos_ids=ids)


def test_an_eos_id_without_a_token_is_refused():
    tokenizer = make_tokenizer("gpt2")
    for eos_id in (len(tokenizer) + 1, len(tokenizer) + 100):
        with pytest.raises(LoraError, match=f"EOS id {eos_id}, but the tokenizer has no such token"):
            convert(tokenizer, rows=len(tokenizer) + 5, eos_ids=(eos_id,))


def test_tokens_at_which_only_llama_cpp_stops_are_noted(tmp_path: Path):
    tokenizer, ids = tokenizer_with_tokens("<|endoftext|>", "<stop>")
    vocabulary = convert(tokenizer, eos_ids=ids[1:])
    assert "llama.cpp also stops at <|endoftext|>" in vocabulary.notes
    with llama_cpp_server.run_llama_cpp(
        write_model(tmp_path / "out.gguf", vocabulary), vocab_size=len(tokenizer), context_length=64
    ) as runtime:
        assert runtime.stops_at(ids[0], after=[50])


def test_chat_templates(tmp_path: Path):
    tokenizer = make_tokenizer("gpt2", chat_template={"default": CHATML, "tool_use": "tools" + CHATML})
    file = write_model(tmp_path / "out.gguf", convert(tokenizer))
    fields = {key: entry.contents() for key, entry in gguf.GGUFReader(str(file)).fields.items()}
    assert fields["tokenizer.chat_template"] == CHATML
    assert fields["tokenizer.chat_template.tool_use"] == "tools" + CHATML
    chat = [{"role": "user", "content": "Hi 12"}]
    with llama_cpp_server.run_llama_cpp(file, vocab_size=len(tokenizer), context_length=64) as runtime:
        assert runtime.chat_prompt(chat) == tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
    assert "chat_template" not in convert(make_tokenizer("gpt2", chat_template=None)).metadata


def test_chats_that_begin_with_a_special_token_get_no_space_after_it(tmp_path: Path):
    """The tokenizer adds a space only before a text; llama.cpp also does after special tokens, or never."""
    with_template, without = make_tokenizer("first"), make_tokenizer("first", chat_template=None)
    assert [convert(each).metadata["add_space_prefix"] for each in (with_template, without)] == [False, True]
    assert any("space before a text" in note for note in convert(with_template).notes)
    prompts = ["<|im_start|>user\nHello 12<|im_end|>\n<|im_start|>assistant\n", "<s>the answer", "<s> the answer"]
    assert llama_cpp_ids(with_template, tmp_path, prompts) == tokenizer_ids(with_template, prompts)


def test_added_tokens_that_strip_the_spaces_after_them(tmp_path: Path):
    """Phi 3's added tokens have `rstrip`; llama.cpp knows that only from the model's name."""
    other = make_tokenizer("llama2")
    other.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    plain = json.loads(other.backend_tokenizer.to_str())
    for entry in plain["added_tokens"]:
        entry["rstrip"] = entry["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    phi = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>", unk_token="<unk>"
    )
    texts = ["<|im_start|>\n Hi<|im_end|>  \nyou", "<s> a", "<|im_end|> ", "a </s>\tb"]
    assert llama_cpp_ids(phi, tmp_path, texts, name="my own") == tokenizer_ids(phi, texts)
    assert tokenizer_ids(other, texts) != tokenizer_ids(phi, texts)
    assert llama_cpp_ids(other, tmp_path, texts, name="Phi3 and mine") == tokenizer_ids(other, texts)
    plain["added_tokens"][0]["rstrip"] = True
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>")
    assert any("rstrip and single_word of <unk>" in note for note in convert(odd).notes)


def test_approximate_pre_tokenizers_are_noted():
    approximate = {kind for kind, (_, _, name) in BYTE_LEVEL.items() if name in pre_tokenizers.APPROXIMATE}
    assert approximate == {"tekken", "gpt-4o", "deepseek-llm"}
    for kind in BYTE_LEVEL:
        assert bool(convert(make_tokenizer(kind)).notes) == (kind in approximate)


def test_nfc_is_noted_and_other_normalizers_are_refused():
    tokenizer = make_tokenizer("qwen2")
    assert not convert(tokenizer).notes
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert any("NFC" in note for note in convert(tokenizer).notes)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LoraError, match="the tokenizer's normalizer Lowercase"):
        convert(tokenizer)


REFUSED: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "wordpiece": (
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), eos_token="[UNK]"
        ),
        "WordPiece tokenizers are not supported",
    ),
    "unigram": (
        lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0))),
        "Unigram tokenizers are not supported",
    ),
    "space prefix": (lambda: build_encoder("roberta"), "not supported by llama.cpp: ByteLevel"),
    "unknown expression": (
        lambda: train_byte_level(sequence(split(r"\w+|\W+"), BYTES_ONLY)),
        r"not supported by llama.cpp: Split \\w\+\|\\W\+, ByteLevel",
    ),
    "matches removed": (
        lambda: train_byte_level(sequence(split(LLAMA3, behavior="Removed"), BYTES_ONLY)),
        "not supported by llama.cpp: Split",
    ),
    "missing merges": (
        lambda: train_sentencepiece(None, metaspace("never"), all_merges=False),
        "does not merge .* llama.cpp would",
    ),
    "split at spaces": (
        lambda: train_sentencepiece(REPLACE, metaspace("never", split_words=True)),
        "splits text at spaces",
    ),
    "spaces not replaced": (lambda: train_sentencepiece(None, None), "does not replace spaces"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_tokenizers_are_refused(name: str):
    make, message = REFUSED[name]
    with pytest.raises(LoraError, match=message) as refused:
        convert(make(), rows=2000)
    assert refused.value.hint


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(LoraError, match="is not a fast tokenizer") as refused:
        convert_tokenizer(PreTrainedTokenizerBase(), LlamaConfig(), generation_eos=[])
    assert "convert_hf_to_gguf.py" in str(refused.value.hint)
