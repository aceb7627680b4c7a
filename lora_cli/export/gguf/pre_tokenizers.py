r"""llama.cpp's name for the way that a byte-level tokenizer cuts text into words, before it merges bytes in each.

llama.cpp knows ways of cutting by a name in the file, and each as regular expressions that are applied one after the
other, what matches and what lies between being words alike. The steps of a tokenizer.json are brought to that same
form here, and looked up.

Facts are from llama.cpp's src/llama-vocab.cpp. Several of its names stand for the same expressions; one of them is
written. A few of its expressions only come near the tokenizer's: see NEAR.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import models

from lora_cli.errors import LoraError

USE_CONVERTER_HINT = "llama.cpp's own converter may know it: python convert_hf_to_gguf.py MODEL --outfile OUT"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENGLISH_TOO = ("'(?i:[sdmt]|ll|ve|re)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CASED_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
PUNCTUATION = "punctuation"  # tokenizer.json has it as a step without an expression
HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Its letters; those that editors put together with others are written as numbers.
DEEPSEEK_LETTERS = (
    r"\s?"
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ"
    "-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)


class PreTokenizerNames(NamedTuple):
    """llama.cpp's names for one way of cutting."""

    merging: str | None  # a word's bytes are merged
    whole: str | None = None  # a word that is a token is taken whole, whatever merges say (`ignore_merges`)


# The expressions in order: names.
PRE_TOKENIZERS: dict[tuple[str, ...], PreTokenizerNames] = {
    (GPT2,): PreTokenizerNames("gpt-2"),  # GPT-2, OLMo, MPT, Phi 2, Pythia
    # SmolLM, StarCoder, Granite 3 (refact), Command R: four names for the same
    (r"\p{N}", GPT2): PreTokenizerNames("smollm"),
    # OLMo 2, Phi 4, DBRX; with words taken whole, Llama 3
    (rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{SIGNS}{BLANKS}",): PreTokenizerNames(
        "smaug-bpe", "llama-bpe"
    ),
    (rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{SIGNS}{BLANKS}",): PreTokenizerNames(
        "qwen2"
    ),  # Qwen 2, 2.5, 3; StableLM 2
    (
        rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{BLANKS}",
    ): PreTokenizerNames("qwen35"),
    (rf"{ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{BLANKS}",): PreTokenizerNames(
        "seed-coder"
    ),
    (rf"{CASED[0]}|{CASED[1]}|\p{{N}}{CASED_SIGNS}{BLANKS}",): PreTokenizerNames(
        None, "tekken"
    ),  # Mistral Nemo and later
    (rf"{CASED[0]}{ENGLISH}?|{CASED[1]}{ENGLISH}?|\p{{N}}{{1,3}}{CASED_SIGNS}{BLANKS}",): PreTokenizerNames("gpt-4o"),
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
        + BLANKS,
    ): PreTokenizerNames("deepseek-v3"),
}
# Names whose expressions in llama.cpp only come near, and how that shows.
CASES = (
    "llama.cpp tells capitals from small letters in ASCII alone, and cuts words at vowel signs and accents that are"
    " characters of their own (Hindi); the tokenizer does otherwise"
)
APPROXIMATE = {
    "tekken": CASES,
    "gpt-4o": CASES,
    "deepseek-llm": "llama.cpp takes the ideographic blank (U+3000) for a blank, the tokenizer for a punctuation mark",
}


def is_byte_level(core: Mapping[str, Any]) -> bool:
    """Whether the tokenizer.json `core` cuts text into words of bytes, as GPT-2's."""
    return any(step["type"] == "ByteLevel" for step in pipeline_steps(core["pre_tokenizer"]))


def pipeline_steps(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A section of a tokenizer.json, its sequences laid out flat."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    return [step for part in section.get("pretokenizers", section.get("normalizers")) for step in pipeline_steps(part)]


def find_pre_tokenizer(core: Mapping[str, Any]) -> str:
    """The name of the way that `core` cuts.

    Raises:
        LoraError: it has none that is known here.
    """
    expressions = tuple(_expressions(core))
    names = PRE_TOKENIZERS.get(expressions)
    if names is None:
        raise _unknown(core)
    takes_whole = bool(core["model"].get("ignore_merges"))
    name = names.whole if takes_whole else names.merging
    if name is None:
        # Where merging a token's own bytes makes that token, taking it whole is the same.
        if not merges_make_every_token(core):
            raise _unknown(core)
        name = names.merging or names.whole
    assert name is not None
    return name


def merges_make_every_token(core: Mapping[str, Any]) -> bool:
    """Whether each token of the BPE tokenizer `core` is what merging its own letters makes, added ones aside."""
    model = core["model"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merging = models.BPE(vocab=model["vocab"], merges=[(left, right) for left, right in pairs], cache_capacity=0)
    added = {entry["content"] for entry in core["added_tokens"]}
    return all(len(merging.tokenize(token)) == 1 for token in model["vocab"] if token not in added)


def _expressions(core: Mapping[str, Any]) -> Iterator[str]:
    """The expressions that the steps apply."""
    for step in pipeline_steps(core["pre_tokenizer"]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                yield GPT2
            case {"type": "ByteLevel", "add_prefix_space": False}:
                continue  # only writes bytes as letters
            case {"type": "Digits", "individual_digits": bool(alone)}:
                yield r"\p{N}" if alone else r"\p{N}+"
            case {"type": "Punctuation", "behavior": "Contiguous"}:
                yield PUNCTUATION
            case {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Isolated", "invert": False}:
                yield _plain(expression)
            # What it does not match goes; but it matches all there is.
            case {"type": "Split", "pattern": {"Regex": str(expression)}, "behavior": "Removed", "invert": True} if (
                expression.endswith(r"|\s+")
            ):
                yield _plain(expression)
            case _:
                raise _unknown(core)


def _plain(expression: str) -> str:
    """One way of writing what can be written in several.

    A quantifier that gives nothing back (`?+`, `++`) finds the same in these expressions, as what follows cannot match
    what it took; and blanks up to the last line end are the same with one line end at their end as with several.
    """
    expression = expression.replace("\r", r"\r").replace("\n", r"\n").replace("?+", "?").replace("++", "+")
    for other in ENGLISH_TOO:
        expression = expression.replace(other, ENGLISH)
    return expression.replace(r"\s*[\r\n]|", r"\s*[\r\n]+|").replace(r"\p{N}{1}", r"\p{N}")


def _unknown(core: Mapping[str, Any]) -> LoraError:
    found = [
        step["type"] + (f" {pattern}" if (pattern := step.get("pattern", {}).get("Regex")) else "")
        for step in pipeline_steps(core["pre_tokenizer"])
    ]
    whole = ", words that are tokens taken whole" if core["model"].get("ignore_merges") else ""
    return LoraError(
        f"--to gguf: no way of cutting text into words that llama.cpp is known to have: {', '.join(found)}{whole}",
        hint=USE_CONVERTER_HINT,
    )
