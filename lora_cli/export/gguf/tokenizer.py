"""A tokenizer as GGUF metadata: what llama.cpp needs to make the same tokens of a text, and to know where to stop.

Two kinds are written: byte-level BPE (GPT-2's), and BPE on characters with bytes for those it lacks (SentencePiece's,
in Llama 2, Mistral 0.1, Gemma, Phi 3). All is read from the fast tokenizer in memory, as it behaves and not as its
config claims. Facts are from llama.cpp's src/llama-vocab.cpp; tests run llama.cpp beside the tokenizer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gguf import GGUFWriter, Keys, TokenType
from jinja2 import TemplateError
from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.export.gguf import pre_tokenizers
from lora_cli.export.gguf.pre_tokenizers import USE_CONVERTER_HINT

BLANK = "\u2581"  # SentencePiece writes a blank as this
BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
# Where a token has one of these texts, llama.cpp ends generation at it; it has done so for years.
EOG_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>",
})  # fmt: skip
# It does so at these as well, by newer versions, or because it takes them for tokens of code completion.
OTHER_EOG_TEXTS = frozenset({
    "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
# But not at the first of these where all the others are tokens too.
NOT_EOG_BESIDE = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|call|>", "<|flush|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)
# In a file whose name has this in it, llama.cpp takes the blanks behind every added token but these for part of it.
PHI3 = re.compile("phi-?3", re.IGNORECASE)
PHI3_PLAIN_TOKENS = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class GGUFVocabulary(NamedTuple):
    """What is told of a tokenizer."""

    metadata: Mapping[str, Any]  # what GGUFWriter's methods are given: `add_` and the key is the method's name
    end_of_turn: tuple[int, ...]  # ids at which generation must stop
    notes: tuple[str, ...]  # where llama.cpp's tokens may be others than the tokenizer's, a line each
    takes_blanks: bool = False  # as PHI3 says


class TokenTable(NamedTuple):
    """Tokens by id, one for each row of the embeddings."""

    texts: list[str]
    types: list[TokenType]


def convert_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, generation_eos: Sequence[int]
) -> GGUFVocabulary:
    """What llama.cpp is to be told of `tokenizer`, for a model of `config`.

    Args:
        tokenizer: a fast one.
        config: its vocab_size is the number of the embeddings' rows.
        generation_eos: ids that end an answer beside the tokenizer's EOS.

    Raises:
        LoraError: a kind of tokenizer that is not covered, one that does not fit the model, or ends of answers that
            the format cannot tell.
    """
    core = _tokenizer_json(tokenizer)
    pieces = _token_table(core, config.get_text_config().vocab_size)
    notes = _flag_notes(core)
    takes_blanks = _takes_blanks(core)
    metadata: dict[str, Any] = {}
    if pre_tokenizers.is_byte_level(core):
        metadata |= _byte_level(core, notes)
    else:
        metadata |= _sentencepiece(core, tokenizer, pieces, notes)
    metadata |= {"token_list": pieces.texts, "token_types": [int(kind) for kind in pieces.types]}
    ends = tuple(dict.fromkeys(number for number in (*generation_eos, tokenizer.eos_token_id) if number is not None))
    metadata |= _bos_and_eos(tokenizer) | _special_ids(tokenizer) | _eog_keys(tokenizer, ends, pieces)
    stops = [
        number for number, text in enumerate(pieces.texts) if text in EOG_TEXTS | OTHER_EOG_TEXTS and number not in ends
    ]
    if stops:
        notes.append(f"llama.cpp ends an answer at {', '.join(pieces.texts[number] for number in stops)} too")
    if learnt := [pieces.texts[number] for number in stops if pieces.types[number] == TokenType.NORMAL]:
        notes.append(f"llama.cpp takes {', '.join(learnt)} in a text for one token, the tokenizer may cut it")
    if tokenizer.chat_template:
        metadata["chat_template"] = _templates(tokenizer.chat_template)
    return GGUFVocabulary(metadata, ends, tuple(notes), takes_blanks)


def add_to_writer(vocabulary: GGUFVocabulary, writer: GGUFWriter) -> None:
    """Give `writer` what `read` found; after the model's name, which tells llama.cpp of one thing (see PHI3)."""
    for key, value in vocabulary.metadata.items():
        getattr(writer, f"add_{key}")(value)
    held = writer.kv_data[0].get(Keys.General.NAME)
    name = str(held.value) if held else ""
    if bool(PHI3.search(name)) != vocabulary.takes_blanks:
        writer.kv_data[0].pop(Keys.General.NAME, None)
        writer.add_name(f"{name} (phi-3)".strip() if vocabulary.takes_blanks else PHI3.sub("phi 3", name))


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer.json in memory.

    Raises:
        LoraError: there is none, or its model is another than plain BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LoraError(f"--to gguf: {type(tokenizer).__name__} is not a fast tokenizer", hint=USE_CONVERTER_HINT)
    core: dict[str, Any] = json.loads(backend.to_str())
    model = core["model"]
    if model["type"] != "BPE":
        raise LoraError(f"--to gguf: a {model['type']} tokenizer; what is covered is BPE", hint=USE_CONVERTER_HINT)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise LoraError(
                f"--to gguf: a tokenizer with {option}, which llama.cpp does not have", hint=USE_CONVERTER_HINT
            )
    return core


def _token_table(core: Mapping[str, Any], rows: int) -> TokenTable:
    """Texts and types; rows that no token has are named and unused.

    Raises:
        LoraError: more tokens than rows, or tokens that share an id or a text.
    """
    texts = {number: text for text, number in core["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in core["added_tokens"]}
    if len(texts) < len(core["model"]["vocab"]):
        raise LoraError("--to gguf: tokens of the tokenizer share an id", hint="mend its tokenizer.json: vocab")
    texts |= {number: entry["content"] for number, entry in added.items()}
    if (largest := max(texts)) >= rows:
        raise LoraError(
            f"--to gguf: the tokenizer has ids up to {largest:,}, and the model {rows:,} embeddings",
            hint="export with the tokenizer the model was made with, or resize the model's embeddings first",
        )
    taken = set(texts.values())
    if len(taken) < len(texts):
        twice = next(text for text in taken if list(texts.values()).count(text) > 1)
        raise LoraError(f"--to gguf: the token {twice!r} has two ids", hint="mend the tokenizer: llama.cpp takes one")
    found = TokenTable([], [])
    for number in range(rows):
        name = f"[PAD{number}]"
        while name in taken:
            name = f"[{name}]"
        found.texts.append(texts.get(number, name))
        kind = TokenType.NORMAL if number in texts else TokenType.UNUSED
        if number in added:
            kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        found.types.append(kind)
    return found


def _byte_level(core: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """GPT-2's kind.

    Raises:
        LoraError: it does what llama.cpp does not.
    """
    model = core["model"]
    for step in pre_tokenizers.pipeline_steps(core["normalizer"]):
        if step["type"] != "NFC":
            raise LoraError(f"--to gguf: a tokenizer that normalizes text by {step['type']}", hint=USE_CONVERTER_HINT)
        notes.append("the tokenizer composes letters and accents that stand apart (NFC), llama.cpp does not")
    letters = sum(len(token) == 1 for token in model["vocab"])
    if letters < 256 and model.get("unk_token"):
        raise LoraError(f"--to gguf: a byte-level tokenizer with {letters} of 256 bytes", hint=USE_CONVERTER_HINT)
    name = pre_tokenizers.find_pre_tokenizer(core)
    if name in pre_tokenizers.APPROXIMATE:
        notes.append(pre_tokenizers.APPROXIMATE[name])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": name,
        "token_merges": merges,
        "add_space_prefix": False,
    }


def _sentencepiece(
    core: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, pieces: TokenTable, notes: list[str]
) -> dict[str, Any]:
    """SentencePiece's kind; types of bytes and of the unknown token, and texts of added ones, are put in `pieces`.

    llama.cpp merges any two neighbours that make a token, the token with the highest score first: so scores are the
    merges' order, and each pair of tokens that makes one has to be a merge.

    Raises:
        LoraError: it is not, or does what llama.cpp does not.
    """
    model = core["model"]
    if not model.get("byte_fallback") or not model["vocab"].keys() >= BYTES:
        raise LoraError(
            "--to gguf: a BPE tokenizer on characters that has no bytes for those it lacks (byte_fallback)",
            hint=USE_CONVERTER_HINT,
        )
    prefix = _prefix(core, tokenizer, notes)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if missing := _unmerged(core, merges):
        left, right = missing
        raise LoraError(
            f"--to gguf: the tokenizer does not merge {left!r} and {right!r}, though {left + right!r} is a token:"
            " llama.cpp would",
            hint="llama.cpp has SentencePiece's own rule, by which every such pair merges; train the tokenizer with it",
        )
    if model.get("ignore_merges") and not pre_tokenizers.merges_make_every_token(core):
        raise LoraError("--to gguf: a tokenizer on characters with ignore_merges", hint=USE_CONVERTER_HINT)
    ranks: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, number)
    replaces = any(step["type"] == "Replace" for step in pre_tokenizers.pipeline_steps(core["normalizer"]))
    for entry in core["added_tokens"]:
        # Such a token is looked for when blanks are replaced already, and llama.cpp looks for it before.
        if not entry["special"] and entry["normalized"] and replaces:
            pieces.texts[entry["id"]] = entry["content"].replace(BLANK, " ")
    for number, text in enumerate(pieces.texts):
        if text in BYTES:
            pieces.types[number] = TokenType.BYTE
        elif text == model.get("unk_token"):
            pieces.types[number] = TokenType.UNKNOWN
    scores = [-float(ranks.get(text, len(merges))) for text in pieces.texts]
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": scores,
        "add_space_prefix": prefix,
        "remove_extra_whitespaces": False,
    }


def _prefix(core: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> bool:
    """Whether a blank is put before a text, and before what follows a special token: llama.cpp does both or neither.

    Raises:
        LoraError: text is changed otherwise too.
    """
    replaced = prefix = False
    for step in [
        *pre_tokenizers.pipeline_steps(core["normalizer"]),
        *pre_tokenizers.pipeline_steps(core["pre_tokenizer"]),
    ]:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaced = True
            case {"type": "Split", "pattern": {"String": " "}} if replaced:
                continue  # there is none left
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": str(scheme), "split": bool(split)}:
                replaced = True
                inner = [token for token in core["model"]["vocab"] if BLANK in token[1:]]
                if split and inner:
                    raise LoraError(
                        f"--to gguf: the tokenizer cuts text at blanks, and has tokens as {inner[0]!r}, which llama.cpp"
                        " would make across them",
                        hint=USE_CONVERTER_HINT,
                    )
                prefix = scheme == "always" or (scheme == "first" and not _chats_begin_special(tokenizer))
                if scheme == "first":
                    where = (
                        "behind each special token too" if prefix else "nowhere, as chats begin with a special token"
                    )
                    notes.append(f"the tokenizer puts a blank before a text, llama.cpp {where}")
                if prefix:
                    notes.append("the tokenizer puts no blank before a text that begins with one, llama.cpp does")
            case _:
                raise LoraError(f"--to gguf: a tokenizer that changes text by {step['type']}", hint=USE_CONVERTER_HINT)
    if not replaced:
        raise LoraError(
            "--to gguf: a BPE tokenizer on characters that leaves blanks as they are", hint=USE_CONVERTER_HINT
        )
    if any(step["type"] == "Prepend" for step in pre_tokenizers.pipeline_steps(core["normalizer"])):
        odd = [entry["content"] for entry in core["added_tokens"] if entry["normalized"]]
        if odd:
            notes.append(f"the tokenizer finds {', '.join(odd)} behind a blank alone, llama.cpp anywhere")
    return prefix


def _chats_begin_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    if not tokenizer.chat_template:
        return False
    try:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except (TemplateError, ValueError):  # no such chat, or no template named "default"
        return False
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] in tokenizer.added_tokens_decoder


def _unmerged(core: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> tuple[str, str] | None:
    """Two tokens that may come to be neighbours, make a token, and are no merge; None where there are none."""
    vocabulary, known = core["model"]["vocab"], set(merges)
    made = {left + right for left, right in merges}
    # These are found in the text before anything is merged.
    apart = BYTES | {entry["content"] for entry in core["added_tokens"] if BLANK not in entry["content"]}

    def arises(text: str) -> bool:
        return text in made or (len(text) == 1 and text in vocabulary)

    for token in vocabulary:
        if token not in apart:
            for cut in range(1, len(token)):
                pair = token[:cut], token[cut:]
                if pair not in known and arises(pair[0]) and arises(pair[1]):
                    return pair
    return None


def _bos_and_eos(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What is put before and after a text.

    Raises:
        LoraError: other than BOS and EOS.
    """
    plain, made = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((n for n in range(len(made)) if made[n : n + len(plain)] == plain), 0)
    before, after = made[:start], made[start + len(plain) :]
    if len(before) > 1 or (before and tokenizer.bos_token_id not in (None, *before)):
        names = " ".join(tokenizer.convert_ids_to_tokens(before))
        raise LoraError(
            f"--to gguf: the tokenizer begins a text with {names}; llama.cpp knows BOS", hint=USE_CONVERTER_HINT
        )
    if after not in ([], [tokenizer.eos_token_id]):
        names = " ".join(tokenizer.convert_ids_to_tokens(after))
        raise LoraError(
            f"--to gguf: the tokenizer ends a text with {names}; llama.cpp knows EOS", hint=USE_CONVERTER_HINT
        )
    bos = {"bos_token_id": before[0]} if before else {}
    return {"add_bos_token": bool(before), "add_eos_token": bool(after), **bos}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    names = ("bos", "unk", "sep", "pad")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    return {key: number for key, number in ids.items() if number is not None}


def _eog_keys(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], pieces: TokenTable) -> dict[str, Any]:
    """Keys for the ends of answers: three, which leaves the others to be found by their texts.

    Raises:
        LoraError: more that cannot be found, one that is no token, or none at all: llama.cpp would take token 11.
    """
    if not ends:
        raise LoraError(
            "--to gguf: nothing ends an answer of this model: no EOS in tokenizer, config or generation_config.json",
            hint="name one in generation_config.json: eos_token_id",
        )
    known = set(pieces.texts)
    for end in ends:
        if end >= len(pieces.texts) or pieces.types[end] == TokenType.UNUSED:
            raise LoraError(
                f"--to gguf: id {end} is said to end an answer, and is no token",
                hint="mend generation_config.json: eos_token_id",
            )
        for text, beside in NOT_EOG_BESIDE:
            if pieces.texts[end] == text and beside <= known:
                raise LoraError(
                    f"--to gguf: {text} ends an answer of this model; llama.cpp takes it for no end beside"
                    f" {' and '.join(sorted(beside))}",
                    hint="take it out of generation_config.json: eos_token_id, if the model does without",
                )
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0]
    others = sorted((end for end in ends if end != eos), key=lambda end: pieces.texts[end] in EOG_TEXTS)
    if untold := [pieces.texts[end] for end in others[2:] if pieces.texts[end] not in EOG_TEXTS]:
        raise LoraError(
            f"--to gguf: {len(ends)} tokens end an answer, and {', '.join(untold)} cannot be told to llama.cpp beside"
            " the others",
            hint="name fewer in generation_config.json: eos_token_id",
        )
    return {"eos_token_id": eos, **dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))}


def _templates(template: str | Mapping[str, str]) -> str | list[dict[str, str]]:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _takes_blanks(core: Mapping[str, Any]) -> bool:
    """Whether added tokens take the blanks behind them just as llama.cpp has it of Phi 3's, which it needs by name."""
    added = {entry["content"]: entry["rstrip"] for entry in core["added_tokens"]}
    takes = {text for text, rstrip in added.items() if rstrip}
    return "</s>" in takes and added.keys() >= PHI3_PLAIN_TOKENS and takes == added.keys() - PHI3_PLAIN_TOKENS


def _flag_notes(core: Mapping[str, Any]) -> list[str]:
    odd = [
        entry["content"]
        for entry in core["added_tokens"]
        if entry["lstrip"] or entry["single_word"] or (entry["rstrip"] and not _takes_blanks(core))
    ]
    return [f"the tokenizer looks at what is beside {', '.join(odd)}, llama.cpp does not"] if odd else []
