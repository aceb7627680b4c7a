r"""Find llama.cpp's name (`tokenizer.ggml.pre`) of a byte-level BPE tokenizer's pre-tokenizer.

A pre-tokenizer splits text into words before BPE merges the bytes of each. llama.cpp knows pre-tokenizers by a name in
the file. Each is a list of regular expressions that are applied in turn; the matches and the text between them are
words. This file turns the steps of a tokenizer.json into such a list, and looks it up.

The facts are from llama.cpp's src/llama-vocab.cpp. Several of its names have the same expressions; the table has one of
them. A few of its expressions differ slightly from the tokenizer's: see APPROXIMATE.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import models

from lora_cli.errors import LoraError

USE_CONVERTER_HINT = "llama.cpp's own converter may support it: python convert_hf_to_gguf.py MODEL --outfile OUT"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
EQUIVALENT_CONTRACTIONS = ("'(?i:[sdmt]|ll|ve|re)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
WHITESPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CASED_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
PUNCTUATION = "punctuation"  # a step of tokenizer.json that has no expression
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Characters that editors combine with others are written as escapes.
DEEPSEEK_LETTERS = (
    r"\s?"
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ"
    "-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)


class PreTokenizerNames(NamedTuple):
    """llama.cpp's names of one pre-tokenizer: it has a separate name where `ignore_merges` is set."""

    with_merges: str | None  # the bytes of each word are merged
    ignore_merges: str | None = None  # a word that is a token is kept, even if no merges produce it


# By the expressions in their order.
PRE_TOKENIZERS: dict[tuple[str, ...], PreTokenizerNames] = {
    (GPT2,): PreTokenizerNames("gpt-2"),  # GPT-2, OLMo, MPT, Phi 2, Pythia
    # SmolLM, StarCoder, Granite 3 (refact), Command R: four names of the same expressions
    (r"\p{N}", GPT2): PreTokenizerNames("smollm"),
    # OLMo 2, Phi 4, DBRX; Llama 3, with ignore_merges
    (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{SYMBOLS}{WHITESPACE}",): PreTokenizerNames(
        "smaug-bpe", "llama-bpe"
    ),
    (rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{SYMBOLS}{WHITESPACE}",): PreTokenizerNames(
        "qwen2"
    ),  # Qwen 2, 2.5, 3; StableLM 2
    (
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{WHITESPACE}",
    ): PreTokenizerNames("qwen35"),
    (
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{WHITESPACE}",
    ): PreTokenizerNames("seed-coder"),
    (rf"{CASED[0]}|{CASED[1]}|\p{{N}}{CASED_SYMBOLS}{WHITESPACE}",): PreTokenizerNames(
        None, "tekken"
    ),  # Mistral Nemo and later
    (
        rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}{CASED_SYMBOLS}{WHITESPACE}",
    ): PreTokenizerNames("gpt-4o"),
    (PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"): PreTokenizerNames("falcon"),
    (r"[\r\n]", DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", HAN, r"\p{N}"): PreTokenizerNames(
        "deepseek-llm"
    ),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"): PreTokenizerNames("deepseek-coder"),
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!"
        + '"'
        + r"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        + WHITESPACE,
    ): PreTokenizerNames("deepseek-v3"),
}
# Names whose expressions in llama.cpp differ slightly from the tokenizer's, and a note on the difference.
LETTER_CASE_NOTE = (
    "unlike the tokenizer, llama.cpp distinguishes upper and lower case in ASCII only, and splits words at vowel signs"
    " and accents that are separate characters (Hindi)"
)
APPROXIMATE = {
    "tekken": LETTER_CASE_NOTE,
    "gpt-4o": LETTER_CASE_NOTE,
    "deepseek-llm": "llama.cpp treats the ideographic space (U+3000) as a space, the tokenizer as punctuation",
}


def is_byte_level(tokenizer_json: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer is byte-level BPE, like GPT-2's."""
    return any(step["type"] == "ByteLevel" for step in pipeline_steps(tokenizer_json["pre_tokenizer"]))


def pipeline_steps(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a section of a tokenizer.json, with nested sequences flattened."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    return [step for part in section.get("pretokenizers", section.get("normalizers")) for step in pipeline_steps(part)]


def find_pre_tokenizer(tokenizer_json: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the tokenizer's pre-tokenizer.

    Raises:
        LoraError: PRE_TOKENIZERS has no entry for this pre-tokenizer.
    """
    expressions = tuple(_expressions(tokenizer_json))
    names = PRE_TOKENIZERS.get(expressions)
    if names is None:
        raise _unknown_pre_tokenizer(tokenizer_json)
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges"))
    name = names.ignore_merges if ignore_merges else names.with_merges
    if name is None:
        # If merging reproduces every token, ignore_merges makes no difference.
        if not merges_make_every_token(tokenizer_json):
            raise _unknown_pre_tokenizer(tokenizer_json)
        name = names.with_merges or names.ignore_merges
    assert name is not None
    return name


def merges_make_every_token(tokenizer_json: Mapping[str, Any]) -> bool:
    """Return whether merging its characters reproduces each token of the BPE vocabulary, except added tokens."""
    model = tokenizer_json["model"]
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    bpe = models.BPE(vocab=model["vocab"], merges=[(left, right) for left, right in merges], cache_capacity=0)
    added = {entry["content"] for entry in tokenizer_json["added_tokens"]}
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _expressions(tokenizer_json: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regular expressions of the steps, in normal form."""
    for step in pipeline_steps(tokenizer_json["pre_tokenizer"]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                yield GPT2
            case {"type": "ByteLevel", "add_prefix_space": False}:
                continue  # only maps bytes to characters
            case {"type": "Digits", "individual_digits": bool(individual)}:
                yield r"\p{N}" if individual else r"\p{N}+"
            case {"type": "Punctuation", "behavior": "Contiguous"}:
                yield PUNCTUATION
            case {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False}:
                yield _normal_form(expression)
            # This step removes the text that does not match, but the expression matches all text.
            case {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Removed", "invert": True} if (
                expression.endswith(r"|\s+")
            ):
                yield _normal_form(expression)
            case _:
                raise _unknown_pre_tokenizer(tokenizer_json)


def _normal_form(expression: str) -> str:
    r"""Return one spelling for equivalent expressions.

    In these expressions possessive quantifiers (`?+`, `++`) match the same as plain ones, because the part after them
    cannot match the same characters. `\s*[\r\n]` matches the same as `\s*[\r\n]+`, because `\s*` includes line ends.
    """
    expression = expression.replace("\r", r"\r").replace("\n", r"\n").replace("?+", "?").replace("++", "+")
    for other in EQUIVALENT_CONTRACTIONS:
        expression = expression.replace(other, CONTRACTIONS)
    return expression.replace(r"\s*[\r\n]|", r"\s*[\r\n]+|").replace(r"\p{N}{1}", r"\p{N}")


def _unknown_pre_tokenizer(tokenizer_json: Mapping[str, Any]) -> LoraError:
    steps = [
        step["type"] + (f" {pattern}" if (pattern := step.get("pattern", {}).get("Regex")) else "")
        for step in pipeline_steps(tokenizer_json["pre_tokenizer"])
    ]
    ignore_merges = ", ignore_merges" if tokenizer_json["model"].get("ignore_merges") else ""
    return LoraError(
        f"--to gguf: the tokenizer's pre-tokenizer is not supported by llama.cpp: {', '.join(steps)}{ignore_merges}",
        hint=USE_CONVERTER_HINT,
    )
