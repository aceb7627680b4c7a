"""Small tokenizers of each kind (pre-tokenizer, normalizer) that llama.cpp distinguishes, trained on a few lines."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.export.gguf.pre_tokenizers import DEEPSEEK_LETTERS
from tests.inputs.tiny_tokenizers import CHATML, TEXTS

LINES = [
    *TEXTS,
    "It's we'll I'M THEY'VE don't: 2024-11-24, 12345.678; $9.99 <b>x</b> != y; a_b camelCase HTTPServer",
    "été naïve Straße ΑΒΓ αβγ привет Мир 你好，世界。 こんにちは カタカナ 한국어 ١٢٣ ²³½ שלום 🙂🙃 👩‍👩‍👧",
    "  two   three    four\n\n\n\tindented\r\n\r\n  x =  1;\n\n 12 123 1234 12345",
] * 2

# Sections `pre_tokenizer` of each family's tokenizer.json, written out: they do not come from the code under test.
BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(expression: str, *, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": behavior, "invert": invert}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FALCON = sequence(
    {"type": "Punctuation", "behavior": "Contiguous"},
    GPT2,
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
)
DEEPSEEK_LLM = sequence(
    split("[\r\n]"),
    split(DEEPSEEK_LETTERS),
    split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
    split(r"\s+$"),
    split("[一-龥ࠀ-一가-퟿]+"),
    DIGITS,
    BYTES_ONLY,
)
DEEPSEEK_CODER = sequence(
    split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS, BYTES_ONLY
)
DEEPSEEK_V3 = sequence(
    split(r"\p{N}{1,3}"),
    split("[一-龥぀-ゟ゠-ヿ]+"),
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    BYTES_ONLY,
)
# By kind: the section `pre_tokenizer`, `ignore_merges`, and llama.cpp's name.
BYTE_LEVEL: dict[str, tuple[dict[str, Any], bool, str]] = {
    "gpt2": (GPT2, False, "gpt-2"),
    "smollm": (sequence(DIGITS, GPT2), False, "smollm"),
    "llama3": (sequence(split(LLAMA3), BYTES_ONLY), True, "llama-bpe"),
    "olmo2": (sequence(split(CL100K, behavior="Removed", invert=True), BYTES_ONLY), False, "smaug-bpe"),
    "qwen2": (sequence(split(QWEN2), BYTES_ONLY), False, "qwen2"),
    "qwen35": (sequence(split(QWEN35), BYTES_ONLY), False, "qwen35"),
    "seed-coder": (sequence(split(SEED), BYTES_ONLY), False, "seed-coder"),
    "tekken": (sequence(split(TEKKEN), BYTES_ONLY), True, "tekken"),
    "gpt-4o": (sequence(split(GPT4O), BYTES_ONLY), False, "gpt-4o"),
    "falcon": (FALCON, False, "falcon"),
    "deepseek-llm": (DEEPSEEK_LLM, False, "deepseek-llm"),
    "deepseek-coder": (DEEPSEEK_CODER, False, "deepseek-coder"),
    "deepseek-v3": (DEEPSEEK_V3, False, "deepseek-v3"),
}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
SPLIT_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def metaspace(scheme: str, *, split_words: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split_words}


def train_byte_level(
    section: dict[str, Any], *, ignore_merges: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained with the section `pre_tokenizer`."""
    empty = json.loads(Tokenizer(models.BPE(ignore_merges=ignore_merges)).to_str())
    core = Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": section}))
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(LINES, trainer)
    return with_special_tokens(core, **options)


def with_special_tokens(core: Tokenizer, *, bos: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    core.add_special_tokens(special)
    core.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    if bos:
        core.add_special_tokens([AddedToken(bos, special=True, normalized=False)])
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    options = {"eos_token": "<|im_end|>", "bos_token": bos, "chat_template": CHATML, **options}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def train_sentencepiece(
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None, *, all_merges: bool = True, **options: Any
) -> PreTrainedTokenizerFast:
    """Return a SentencePiece BPE tokenizer. With a normalizer, runs of spaces and of newlines are added tokens (Gemma).

    With `all_merges`, any two tokens that form a token are a merge, as in SentencePiece.
    """
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(
        [line.replace(" ", "▁") for line in LINES],
        trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *BYTES]),
    )
    tokenizer_json = json.loads(trained.to_str())
    vocabulary, merges = tokenizer_json["model"]["vocab"], tokenizer_json["model"]["merges"]
    if all_merges:
        runs = [letter * length for length in range(8, 1, -1) for letter in "▁\n" if normalizer]
        for run in runs:
            vocabulary.setdefault(run, len(vocabulary))
        merged = [*runs, *(token for token in ("".join(merge) for merge in merges) if token not in runs)]
        cuts = [[token[:at], token[at:]] for token in merged for at in range(len(token) - 1, 0, -1)]
        merges = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        added = tokenizer_json["added_tokens"][0] | {"special": False, "normalized": False}
        tokenizer_json["added_tokens"] += [added | {"id": vocabulary[run], "content": run} for run in runs]
    tokenizer_json["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "merges": merges}
    tokenizer_json |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    tokenizer_json["added_tokens"] = [
        token for token in tokenizer_json["added_tokens"] if token["content"] not in BYTES
    ]
    core = Tokenizer.from_str(json.dumps(tokenizer_json))
    return with_special_tokens(core, unk_token="<unk>", **{"bos": "<s>", **options})


BYTES = [f"<0x{value:02X}>" for value in range(256)]
# By kind: the sections `normalizer` and `pre_tokenizer`.
SENTENCEPIECE: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "llama2": (PREPEND, None),
    "gemma": (REPLACE, SPLIT_AT_SPACES),
    "never": (None, metaspace("never")),
    "always": (None, metaspace("always")),
    "first": (None, metaspace("first")),
}
KINDS = [*BYTE_LEVEL, *SENTENCEPIECE]


def make_tokenizer(kind: str, **options: Any) -> PreTrainedTokenizerFast:
    if kind in BYTE_LEVEL:
        section, ignore_merges, _ = BYTE_LEVEL[kind]
        return train_byte_level(section, ignore_merges=ignore_merges, **options)
    return train_sentencepiece(*SENTENCEPIECE[kind], **options)
