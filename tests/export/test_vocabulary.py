"""llama.cpp makes the tokenizer's own tokens of a text, and ends where the model does."""

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
from lora_cli.export.gguf import llama_cpp_server
from lora_cli.export.gguf import pre_tokenizers as ways
from lora_cli.export.gguf.llama_cpp_server import LlamaCpp
from lora_cli.export.gguf.tokenizer import GGUFVocabulary, add_to_writer, convert_tokenizer
from tests.export.kinds import (
    BYTE_LEVEL,
    BYTES,
    BYTES_ONLY,
    KINDS,
    LLAMA3,
    REPLACE,
    byte_level,
    make,
    metaspace,
    sentencepiece,
    sequence,
    split,
)
from tests.inputs.tiny_tokenizers import CHATML, build_encoder

# What tokenizers are known to stumble over.
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
# Characters that Unicode has had for long, of every class that some expression tells apart, and what falls together.
CHARACTERS = (
    "aAbsStTdDmMlLvVrReE'’ \t\n\r.,;:!?-_/\\()[]{}<>|$+=^~`#%&*\""
    "0123456789éÉßñΩωЖжǅªʰ中文かナ한أع١²½Ⅷ🙂👩\u200d\u00a0\u3000\u2028\x0b"
)
PHRASES = [" the answer", "  12", "<|im_end|>", "<tool>", "'ll", "1234", "\n\n", "   ", "HTTPServer"]
TEXT = st.lists(st.sampled_from(CHARACTERS) | st.sampled_from(PHRASES), max_size=40).map("".join)


def read(tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None, ends: tuple[int, ...] = ()) -> GGUFVocabulary:
    return convert_tokenizer(tokenizer, LlamaConfig(vocab_size=rows or len(tokenizer)), generation_eos=ends)


def write(file: Path, found: GGUFVocabulary, *, name: str = "tiny") -> Path:
    """A model of one layer with this vocabulary; its weights mean nothing."""
    rows, width = len(found.metadata["token_list"]), 32
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name(name)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    add_to_writer(found, writer)
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
    """A kind, its tokenizer, and llama.cpp with what was told of it."""
    tokenizer = make(request.param, chat_template=None)
    file = write(tmp_path_factory.mktemp("vocabulary") / "out.gguf", read(tokenizer, rows=len(tokenizer) + 5))
    with llama_cpp_server.run_llama_cpp(file, vocabulary=len(tokenizer) + 5, context=64) as runtime:
        yield request.param, tokenizer, runtime


def same(kind: str, tokenizer: PreTrainedTokenizerBase, runtime: LlamaCpp, text: str) -> None:
    for special in (False, True):
        expected = tokenizer(text, add_special_tokens=special)["input_ids"]
        assert runtime.tokenize(text, add_special=special) == expected, (kind, text)


def alike(kind: str, text: str) -> str:
    """`text` without what the notes tell of: there llama.cpp does otherwise than the tokenizer."""
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
        same(kind, tokenizer, runtime, alike(kind, text))


@given(text=TEXT)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_the_same_tokens(pair: Any, text: str):
    kind, tokenizer, runtime = pair
    same(kind, tokenizer, runtime, alike(kind, text))


def tokens_of(tokenizer: PreTrainedTokenizerBase, folder: Path, texts: list[str], **options: Any) -> list[list[int]]:
    """What llama.cpp makes of `texts`."""
    found = read(tokenizer)
    with llama_cpp_server.run_llama_cpp(
        write(folder / "out.gguf", found, **options), vocabulary=len(tokenizer), context=64
    ) as runtime:
        return [runtime.tokenize(text) for text in texts]


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_every_way_of_cutting_is_tested_by_its_name():
    names = {name for entry in ways.PRE_TOKENIZERS.values() for name in entry if name}
    assert {name for _, _, name in BYTE_LEVEL.values()} == names
    for kind, (_, _, name) in BYTE_LEVEL.items():
        assert read(make(kind)).metadata["tokenizer_pre"] == name


def test_words_taken_whole_are_told_from_words_merged():
    """Two names of llama.cpp differ in that alone; where there is one, both have to be the same."""
    section, _, _ = BYTE_LEVEL["llama3"]
    assert read(byte_level(section, whole=False)).metadata["tokenizer_pre"] == "smaug-bpe"
    assert read(byte_level(BYTE_LEVEL["qwen2"][0], whole=True)).metadata["tokenizer_pre"] == "qwen2"
    plain = json.loads(byte_level(BYTE_LEVEL["qwen2"][0], whole=True).backend_tokenizer.to_str())
    plain["model"]["merges"] = plain["model"]["merges"][:-1]
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>")
    with pytest.raises(LoraError, match="taken whole"):
        read(lacking)


def test_the_demo_model_has_the_metadata_of_its_own_file(demo_folder: Path, demo_gguf: Path):
    tokenizer, config = AutoTokenizer.from_pretrained(demo_folder), AutoConfig.from_pretrained(demo_folder)
    writer = gguf.GGUFWriter("unused", "llama")
    add_to_writer(convert_tokenizer(tokenizer, config, generation_eos=[2]), writer)
    mine = {key: held.value for key, held in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    fields = gguf.GGUFReader(str(demo_gguf)).fields.items()
    theirs = {key: held.contents() for key, held in fields if key.startswith("tokenizer.")}
    # The folder was made from the file by transformers, which has lost that digits stand alone; no merge joins them.
    assert mine.pop("tokenizer.ggml.pre") == "gpt-2"
    assert theirs.pop("tokenizer.ggml.pre") == "smollm"
    assert mine.pop("tokenizer.ggml.add_eos_token") is False  # llama.cpp's default for the kind
    assert mine == theirs


def test_the_demo_model_makes_the_same_tokens(demo_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    assert tokens_of(tokenizer, tmp_path, HOSTILE) == ids_of(tokenizer, HOSTILE)


def test_rows_without_a_token_are_named_and_unused():
    tokenizer = make("gpt2")
    tokenizer.add_tokens([f"[PAD{len(tokenizer) + 3}]"])
    held = len(tokenizer)
    found = read(tokenizer, rows=held + 7)
    texts, types = found.metadata["token_list"], found.metadata["token_types"]
    assert len(texts) == len(types) == len(set(texts)) == held + 7
    assert {texts[number]: number for number in range(held)} == tokenizer.get_vocab()
    assert set(types[held:]) == {gguf.TokenType.UNUSED}
    assert gguf.TokenType.UNUSED not in types[:held]


def test_a_hole_in_the_ids_is_filled(tmp_path: Path):
    plain = json.loads(make("gpt2").backend_tokenizer.to_str())
    for entry in plain["added_tokens"]:
        entry["id"] += 3
        plain["model"]["vocab"][entry["content"]] = entry["id"]
    holed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>")
    rows = max(holed.get_vocab().values()) + 1
    assert rows == len(holed) + 3
    found = read(holed, rows=rows)
    assert found.metadata["token_types"].count(gguf.TokenType.UNUSED) == 3
    with llama_cpp_server.run_llama_cpp(write(tmp_path / "out.gguf", found), vocabulary=rows, context=64) as runtime:
        for text in HOSTILE:
            same("gpt2", holed, runtime, text)


def test_more_tokens_than_embeddings_are_refused():
    tokenizer = make("gpt2")
    with pytest.raises(LoraError, match=rf"up to {len(tokenizer) - 1}, and the model {len(tokenizer) - 1} embeddings"):
        read(tokenizer, rows=len(tokenizer) - 1)


def test_types_tell_what_is_special():
    for kind in ("gpt2", "llama2"):
        tokenizer = make(kind)
        found = read(tokenizer).metadata
        kinds = dict(zip(found["token_list"], found["token_types"], strict=True))
        assert kinds["<|im_end|>"] == gguf.TokenType.CONTROL
        assert kinds["<tool>"] == gguf.TokenType.USER_DEFINED
        assert kinds["a"] == gguf.TokenType.NORMAL
        if kind == "llama2":
            assert kinds["<unk>"] == gguf.TokenType.UNKNOWN
            assert {kinds[text] for text in BYTES} == {gguf.TokenType.BYTE}


@pytest.mark.parametrize("claims", [{}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("bos", [None, "<|bos|>"])
def test_bos_and_eos_are_added_as_the_tokenizer_does(bos: str | None, claims: dict[str, bool], tmp_path: Path):
    tokenizer = make("gpt2", bos=bos, **claims)
    with llama_cpp_server.run_llama_cpp(
        write(tmp_path / "out.gguf", read(tokenizer)), vocabulary=len(tokenizer), context=64
    ) as runtime:
        same("gpt2", tokenizer, runtime, "Hello")
        # What a tokenizer is told after it was made, it says and does not do.
        tokenizer.init_kwargs["add_bos_token"] = not claims
        assert read(tokenizer).metadata["add_bos_token"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def test_what_stands_around_a_text_is_bos_and_eos_or_refused():
    tokenizer = make("gpt2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(text, tokenizer.convert_tokens_to_ids(text)) for text in ("<|im_start|>", "<|im_end|>")],
    )
    found = read(tokenizer).metadata
    assert found["add_bos_token"]
    assert found["add_eos_token"]
    assert found["bos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.bos_token = "<|im_end|>"
    with pytest.raises(LoraError, match=r"begins a text with <\|im_start\|>"):
        read(tokenizer)
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_start|>"
    with pytest.raises(LoraError, match=r"ends a text with <\|im_end\|>"):
        read(tokenizer)


def with_ends(*texts: str) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
    tokenizer = make("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": list(texts)})
    return tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(texts)))


@pytest.mark.parametrize(
    "texts",
    [("<stop>",), ("<stop>", "<halt>"), ("<|eot_id|>", "<stop>", "<|end|>", "<halt>", "<|eom_id|>"), ("<|eot_id|>",)],
)
def test_llama_cpp_stops_at_every_end(texts: tuple[str, ...], tmp_path: Path):
    tokenizer, ends = with_ends(*texts)
    found = read(tokenizer, ends=ends)
    assert set(found.end_of_turn) == {*ends, tokenizer.eos_token_id}
    after = tokenizer("The answer is")["input_ids"]
    with llama_cpp_server.run_llama_cpp(
        write(tmp_path / "out.gguf", found), vocabulary=len(tokenizer), context=64
    ) as runtime:
        for end in found.end_of_turn:
            assert runtime.stops_at(end, after=after), tokenizer.convert_ids_to_tokens(end)
        assert not runtime.stops_at(tokenizer.convert_tokens_to_ids("<tool>"), after=after)


def test_the_only_end_may_be_the_models(tmp_path: Path):
    """A tokenizer without EOS: llama.cpp would take token 11 for it."""
    tokenizer, ends = with_ends("<stop>")
    tokenizer.eos_token = None
    found = read(tokenizer, ends=ends)
    assert found.metadata["eos_token_id"] == ends[0]
    with pytest.raises(LoraError, match="nothing ends an answer"):
        read(tokenizer)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("<a>", "<b>", "<c>"), "4 tokens end an answer, and <c> cannot be told"),
        (("<|end|>", "<|return|>", "<|call|>"), "<.end.> ends an answer of this model; llama.cpp takes it for no end"),
    ],
)
def test_ends_that_cannot_be_told_are_refused(texts: tuple[str, ...], says: str):
    tokenizer, ends = with_ends(*texts)
    with pytest.raises(LoraError, match=says):
        read(tokenizer, ends=ends)


def test_an_end_that_is_no_token_is_refused():
    tokenizer = make("gpt2")
    for end in (len(tokenizer) + 1, len(tokenizer) + 100):
        with pytest.raises(LoraError, match=f"id {end} is said to end an answer"):
            read(tokenizer, rows=len(tokenizer) + 5, ends=(end,))


def test_ends_of_llama_cpps_own_are_told_of(tmp_path: Path):
    tokenizer, ends = with_ends("<|endoftext|>", "<stop>")
    found = read(tokenizer, ends=ends[1:])
    assert "llama.cpp ends an answer at <|endoftext|> too" in found.notes
    with llama_cpp_server.run_llama_cpp(
        write(tmp_path / "out.gguf", found), vocabulary=len(tokenizer), context=64
    ) as runtime:
        assert runtime.stops_at(ends[0], after=[50])


def test_chat_templates(tmp_path: Path):
    tokenizer = make("gpt2", chat_template={"default": CHATML, "tool_use": "tools" + CHATML})
    file = write(tmp_path / "out.gguf", read(tokenizer))
    fields = {key: held.contents() for key, held in gguf.GGUFReader(str(file)).fields.items()}
    assert fields["tokenizer.chat_template"] == CHATML
    assert fields["tokenizer.chat_template.tool_use"] == "tools" + CHATML
    chat = [{"role": "user", "content": "Hi 12"}]
    with llama_cpp_server.run_llama_cpp(file, vocabulary=len(tokenizer), context=64) as runtime:
        assert runtime.chat_prompt(chat) == tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
    assert "chat_template" not in read(make("gpt2", chat_template=None)).metadata


def test_chats_that_begin_with_a_special_token_get_no_blank_behind_it(tmp_path: Path):
    """A tokenizer that puts a blank first in a text only: llama.cpp does so behind special tokens too, or never."""
    chats, texts = make("first"), make("first", chat_template=None)
    assert [read(each).metadata["add_space_prefix"] for each in (chats, texts)] == [False, True]
    assert any("blank before a text" in note for note in read(chats).notes)
    prompts = ["<|im_start|>user\nHello 12<|im_end|>\n<|im_start|>assistant\n", "<s>the answer", "<s> the answer"]
    assert tokens_of(chats, tmp_path, prompts) == ids_of(chats, prompts)


def test_added_tokens_that_take_the_blanks_behind_them(tmp_path: Path):
    """As Phi 3's do: llama.cpp knows of it by the model's name alone."""
    other = make("llama2")
    other.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    plain = json.loads(other.backend_tokenizer.to_str())
    for entry in plain["added_tokens"]:
        entry["rstrip"] = entry["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    phi = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>", unk_token="<unk>"
    )
    texts = ["<|im_start|>\n Hi<|im_end|>  \nyou", "<s> a", "<|im_end|> ", "a </s>\tb"]
    assert tokens_of(phi, tmp_path, texts, name="my own") == ids_of(phi, texts)
    assert ids_of(other, texts) != ids_of(phi, texts)
    assert tokens_of(other, tmp_path, texts, name="Phi3 and mine") == ids_of(other, texts)
    plain["added_tokens"][0]["rstrip"] = True
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="<|im_end|>")
    assert any("looks at what is beside <unk>" in note for note in read(odd).notes)


def test_where_llama_cpp_cuts_otherwise_is_told():
    told = {kind for kind, (_, _, name) in BYTE_LEVEL.items() if name in ways.APPROXIMATE}
    assert told == {"tekken", "gpt-4o", "deepseek-llm"}
    for kind in BYTE_LEVEL:
        assert bool(read(make(kind)).notes) == (kind in told)


def test_letters_and_accents_that_stand_apart_are_told_of():
    tokenizer = make("qwen2")
    assert not read(tokenizer).notes
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert any("NFC" in note for note in read(tokenizer).notes)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LoraError, match="normalizes text by Lowercase"):
        read(tokenizer)


REFUSED: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "wordpiece": (
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), eos_token="[UNK]"
        ),
        "a WordPiece tokenizer",
    ),
    "unigram": (
        lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0))),
        "a Unigram tokenizer",
    ),
    "blank first": (lambda: build_encoder("roberta"), "is known to have: ByteLevel"),
    "unknown expression": (
        lambda: byte_level(sequence(split(r"\w+|\W+"), BYTES_ONLY)),
        r"is known to have: Split \\w\+\|\\W\+, ByteLevel",
    ),
    "matched parts go": (
        lambda: byte_level(sequence(split(LLAMA3, behavior="Removed"), BYTES_ONLY)),
        "is known to have: Split",
    ),
    "own merges": (
        lambda: sentencepiece(None, metaspace("never"), complete=False),
        "does not merge .* llama.cpp would",
    ),
    "cut at blanks": (lambda: sentencepiece(REPLACE, metaspace("never", cut=True)), "cuts text at blanks"),
    "blanks as they are": (lambda: sentencepiece(None, None), "leaves blanks as they are"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_and_named(name: str):
    made, says = REFUSED[name]
    with pytest.raises(LoraError, match=says) as refused:
        read(made(), rows=2000)
    assert refused.value.hint


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(LoraError, match="is not a fast tokenizer") as refused:
        convert_tokenizer(PreTrainedTokenizerBase(), LlamaConfig(), generation_eos=[])
    assert "convert_hf_to_gguf.py" in str(refused.value.hint)
