"""Convert a fast tokenizer to GGUF metadata: vocabulary, merges or scores, special tokens, EOS ids, chat template.

Two kinds are supported: byte-level BPE (like GPT-2's), and SentencePiece BPE with byte fallback (like that of Llama 2,
Mistral 0.1, Gemma, Phi 3). Everything is read from the fast tokenizer in memory, because its config file can differ
from what it does. The facts are from llama.cpp's src/llama-vocab.cpp; tests compare llama.cpp with the tokenizer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gguf import GGUFWriter, Keys, TokenType
from transformers import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.export.gguf import pre_tokenizers
from lora_cli.export.gguf.pre_tokenizers import USE_CONVERTER_HINT
from lora_cli.export.probe_chats import render_prompt

METASPACE = "\u2581"  # SentencePiece's character for a space
BYTE_TOKENS = frozenset(f"<0x{value:02X}>" for value in range(256))
# llama.cpp stops generation at tokens with these texts (EOG: end of generation), in old versions too.
EOG_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>",
})  # fmt: skip
# It also stops at these: in newer versions only, or because it treats them as tokens of code completion.
OTHER_EOG_TEXTS = frozenset({
    "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})  # fmt: skip
# It does not stop at the first text of a pair if the vocabulary has all of the others.
NOT_EOG_WITH = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|call|>", "<|flush|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)
# If the model's name matches this, llama.cpp strips the whitespace after each added token (rstrip), except after these.
PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)
PHI3_WITHOUT_RSTRIP = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class GGUFVocabulary(NamedTuple):
    """A tokenizer as GGUF metadata."""

    metadata: Mapping[str, Any]  # arguments of GGUFWriter's methods, by method name without `add_`
    eos_ids: tuple[int, ...]  # ids at which generation must stop
    notes: tuple[str, ...]  # one line for each way in which llama.cpp may tokenize differently
    phi3_rstrip: bool = False  # see PHI3_NAME


class TokenTable(NamedTuple):
    """Tokens by id, one for each row of the embeddings."""

    texts: list[str]
    types: list[TokenType]


def convert_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, *, generation_eos: Sequence[int]
) -> GGUFVocabulary:
    """Return the GGUF metadata of `tokenizer`, for a model of `config`.

    Args:
        tokenizer: a fast tokenizer.
        config: of the model; its vocab_size is the number of rows of the embeddings.
        generation_eos: EOS ids in addition to the tokenizer's.

    Raises:
        LoraError: the kind of tokenizer is not supported, it does not fit the model, or GGUF cannot store its EOS ids.
    """
    tokenizer_json = _tokenizer_json(tokenizer)
    table = _token_table(tokenizer_json, config.get_text_config().vocab_size)
    notes = _flag_notes(tokenizer_json)
    phi3_rstrip = _has_phi3_rstrip(tokenizer_json)
    metadata: dict[str, Any] = {}
    if pre_tokenizers.is_byte_level(tokenizer_json):
        metadata |= _byte_level(tokenizer_json, notes)
    else:
        metadata |= _sentencepiece(tokenizer_json, tokenizer, table, notes)
    metadata |= {"token_list": table.texts, "token_types": [int(token_type) for token_type in table.types]}
    eos_ids = tuple(dict.fromkeys(number for number in (*generation_eos, tokenizer.eos_token_id) if number is not None))
    metadata |= _bos_and_eos(tokenizer) | _special_ids(tokenizer) | _eog_keys(tokenizer, eos_ids, table)
    extra_eog = [
        number
        for number, text in enumerate(table.texts)
        if text in EOG_TEXTS | OTHER_EOG_TEXTS and number not in eos_ids
    ]
    if extra_eog:
        notes.append(f"llama.cpp also stops at {', '.join(table.texts[number] for number in extra_eog)}")
    if plain := [table.texts[number] for number in extra_eog if table.types[number] == TokenType.NORMAL]:
        notes.append(f"llama.cpp encodes {', '.join(plain)} in a text as one token, the tokenizer may split it")
    if tokenizer.chat_template:
        metadata["chat_template"] = _chat_templates(tokenizer.chat_template)
    return GGUFVocabulary(metadata, eos_ids, tuple(notes), phi3_rstrip)


def add_to_writer(vocabulary: GGUFVocabulary, writer: GGUFWriter) -> None:
    """Add the metadata to `writer`. The model's name must be set before: it is changed if PHI3_NAME requires it."""
    for key, value in vocabulary.metadata.items():
        getattr(writer, f"add_{key}")(value)
    entry = writer.kv_data[0].get(Keys.General.NAME)
    name = str(entry.value) if entry else ""
    if bool(PHI3_NAME.search(name)) != vocabulary.phi3_rstrip:
        writer.kv_data[0].pop(Keys.General.NAME, None)
        writer.add_name(f"{name} (phi-3)".strip() if vocabulary.phi3_rstrip else PHI3_NAME.sub("phi 3", name))


def _unsupported(message: str) -> LoraError:
    return LoraError(f"--to gguf: {message}", hint=USE_CONVERTER_HINT)


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the tokenizer.json of the tokenizer in memory.

    Raises:
        LoraError: the tokenizer is not a fast one, or not plain BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(f"{type(tokenizer).__name__} is not a fast tokenizer")
    tokenizer_json: dict[str, Any] = json.loads(backend.to_str())
    model = tokenizer_json["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"{model['type']} tokenizers are not supported, only BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _unsupported(f"llama.cpp does not support the tokenizer's option {option}")
    return tokenizer_json


def _token_table(tokenizer_json: Mapping[str, Any], rows: int) -> TokenTable:
    """Return texts and types of all ids; rows of the embeddings without a token get a name and the type UNUSED.

    Raises:
        LoraError: there are more tokens than rows, or two tokens have the same id or text.
    """
    texts = {number: text for text, number in tokenizer_json["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer_json["added_tokens"]}
    if len(texts) < len(tokenizer_json["model"]["vocab"]):
        raise LoraError("--to gguf: two tokens of the tokenizer have the same id", hint="fix vocab in tokenizer.json")
    texts |= {number: entry["content"] for number, entry in added.items()}
    if (largest := max(texts)) >= rows:
        raise LoraError(
            f"--to gguf: the tokenizer has ids up to {largest:,}, but the model has {rows:,} embeddings",
            hint="export with the tokenizer that the model was trained with, or resize the model's embeddings first",
        )
    taken = set(texts.values())
    if len(taken) < len(texts):
        duplicate = next(text for text in taken if list(texts.values()).count(text) > 1)
        raise LoraError(f"--to gguf: the token {duplicate!r} has two ids", hint="give it one id in tokenizer.json")
    table = TokenTable([], [])
    for number in range(rows):
        name = f"[PAD{number}]"
        while name in taken:
            name = f"[{name}]"
        table.texts.append(texts.get(number, name))
        token_type = TokenType.NORMAL if number in texts else TokenType.UNUSED
        if number in added:
            token_type = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        table.types.append(token_type)
    return table


def _byte_level(tokenizer_json: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the metadata of byte-level BPE.

    Raises:
        LoraError: the tokenizer has a feature that llama.cpp does not support.
    """
    model = tokenizer_json["model"]
    for step in pre_tokenizers.pipeline_steps(tokenizer_json["normalizer"]):
        if step["type"] != "NFC":
            raise _unsupported(f"llama.cpp does not support the tokenizer's normalizer {step['type']}")
        notes.append("the tokenizer composes letters with separate accents (Unicode NFC), llama.cpp does not")
    byte_count = sum(len(token) == 1 for token in model["vocab"])
    if byte_count < 256 and model.get("unk_token"):
        raise _unsupported(f"a byte-level tokenizer with tokens for only {byte_count} of 256 bytes is not supported")
    name = pre_tokenizers.find_pre_tokenizer(tokenizer_json)
    if name in pre_tokenizers.APPROXIMATE:
        notes.append(pre_tokenizers.APPROXIMATE[name])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"tokenizer_model": "gpt2", "tokenizer_pre": name, "token_merges": merges, "add_space_prefix": False}


def _sentencepiece(
    tokenizer_json: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, table: TokenTable, notes: list[str]
) -> dict[str, Any]:
    """Return the metadata of SentencePiece BPE; change types (byte, unknown) and texts (added tokens) in `table`.

    llama.cpp merges any two neighbors whose concatenation is a token, the token with the highest score first. So the
    scores are the order of the merges, and each pair of tokens that forms a token must be a merge.

    Raises:
        LoraError: such a pair is not a merge, or the tokenizer has a feature that llama.cpp does not support.
    """
    model = tokenizer_json["model"]
    if not model.get("byte_fallback") or not model["vocab"].keys() >= BYTE_TOKENS:
        raise _unsupported("a BPE tokenizer must be byte-level, or have byte_fallback with all 256 byte tokens")
    add_space_prefix = _adds_space_prefix(tokenizer_json, tokenizer, notes)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if missing := _missing_merge(tokenizer_json, merges):
        left, right = missing
        raise LoraError(
            f"--to gguf: the tokenizer does not merge {left!r} and {right!r} although {left + right!r} is a token;"
            " llama.cpp would merge them",
            hint="llama.cpp merges every such pair, as SentencePiece does; train the tokenizer by SentencePiece's rule",
        )
    if model.get("ignore_merges") and not pre_tokenizers.merges_make_every_token(tokenizer_json):
        raise _unsupported("a SentencePiece BPE tokenizer with ignore_merges is not supported")
    ranks: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, number)
    replaces = any(step["type"] == "Replace" for step in pre_tokenizers.pipeline_steps(tokenizer_json["normalizer"]))
    for entry in tokenizer_json["added_tokens"]:
        # The tokenizer searches for such a token after it has replaced spaces, llama.cpp before.
        if not entry["special"] and entry["normalized"] and replaces:
            table.texts[entry["id"]] = entry["content"].replace(METASPACE, " ")
    for number, text in enumerate(table.texts):
        if text in BYTE_TOKENS:
            table.types[number] = TokenType.BYTE
        elif text == model.get("unk_token"):
            table.types[number] = TokenType.UNKNOWN
    scores = [-float(ranks.get(text, len(merges))) for text in table.texts]
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_scores": scores,
        "add_space_prefix": add_space_prefix,
        "remove_extra_whitespaces": False,
    }


def _adds_space_prefix(tokenizer_json: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> bool:
    """Return whether llama.cpp must add a space before a text and after each special token: it does both or neither.

    Raises:
        LoraError: a normalizer or pre-tokenizer step is not supported.
    """
    replaced = prefix = False
    for step in [
        *pre_tokenizers.pipeline_steps(tokenizer_json["normalizer"]),
        *pre_tokenizers.pipeline_steps(tokenizer_json["pre_tokenizer"]),
    ]:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaced = True
            case {"type": "Split", "pattern": {"String": " "}} if replaced:
                continue  # no space is left to split at
            case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": str(scheme), "split": bool(split)}:
                replaced = True
                inner = [token for token in tokenizer_json["model"]["vocab"] if METASPACE in token[1:]]
                if split and inner:
                    raise _unsupported(
                        f"the tokenizer splits text at spaces but has tokens like {inner[0]!r}, which"
                        " llama.cpp would merge across spaces"
                    )
                prefix = scheme == "always" or (scheme == "first" and not _chats_begin_special(tokenizer))
                if scheme == "first":
                    where = "after each special token too" if prefix else "never: chats begin with a special token"
                    notes.append(f"the tokenizer adds a space before a text, llama.cpp {where}")
                if prefix:
                    notes.append("the tokenizer adds no space before a text that begins with one, llama.cpp does")
            case _:
                raise _unsupported(f"llama.cpp does not support the tokenizer's step {step['type']}")
    if not replaced:
        raise _unsupported("a BPE tokenizer with byte_fallback that does not replace spaces by U+2581 is not supported")
    if any(step["type"] == "Prepend" for step in pre_tokenizers.pipeline_steps(tokenizer_json["normalizer"])):
        normalized = [entry["content"] for entry in tokenizer_json["added_tokens"] if entry["normalized"]]
        if normalized:
            notes.append(f"the tokenizer finds {', '.join(normalized)} only after a space, llama.cpp anywhere")
    return prefix


def _chats_begin_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template
    if not template or (isinstance(template, dict) and "default" not in template):
        return False
    chat = render_prompt(tokenizer, [{"role": "user", "content": "a"}], generation_prompt=False)
    if chat is None:  # the template rejects this chat
        return False
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    return bool(ids) and ids[0] in tokenizer.added_tokens_decoder


def _missing_merge(tokenizer_json: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> tuple[str, str] | None:
    """Return two tokens that can become neighbors and form a token, but are not a merge; None if all are merges."""
    vocabulary, known = tokenizer_json["model"]["vocab"], set(merges)
    merged = {left + right for left, right in merges}
    # These are found in the text before merging starts.
    unmerged = BYTE_TOKENS | {
        entry["content"] for entry in tokenizer_json["added_tokens"] if METASPACE not in entry["content"]
    }

    def can_occur(text: str) -> bool:
        return text in merged or (len(text) == 1 and text in vocabulary)

    for token in vocabulary:
        if token not in unmerged:
            for cut in range(1, len(token)):
                pair = token[:cut], token[cut:]
                if pair not in known and can_occur(pair[0]) and can_occur(pair[1]):
                    return pair
    return None


def _bos_and_eos(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the metadata on the tokens that the tokenizer adds before and after a text.

    Raises:
        LoraError: it adds tokens other than BOS and EOS.
    """
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
    before, after = full[:start], full[start + len(plain) :]
    if len(before) > 1 or (before and tokenizer.bos_token_id not in (None, *before)):
        names = " ".join(tokenizer.convert_ids_to_tokens(before))
        raise _unsupported(f"the tokenizer begins a text with {names}; llama.cpp supports BOS only")
    if after not in ([], [tokenizer.eos_token_id]):
        names = " ".join(tokenizer.convert_ids_to_tokens(after))
        raise _unsupported(f"the tokenizer ends a text with {names}; llama.cpp supports EOS only")
    bos = {"bos_token_id": before[0]} if before else {}
    return {"add_bos_token": bool(before), "add_eos_token": bool(after), **bos}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "unk", "sep", "pad")}
    return {key: number for key, number in ids.items() if number is not None}


def _eog_keys(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], table: TokenTable) -> dict[str, Any]:
    """Return the three metadata keys for EOS ids; llama.cpp must find any others by their texts.

    Raises:
        LoraError: llama.cpp cannot find an EOS id, an EOS id is not a token, or the model has no EOS (llama.cpp would
            use token 11).
    """
    if not eos_ids:
        raise LoraError(
            "--to gguf: the model has no EOS token in tokenizer, config or generation_config.json",
            hint="set eos_token_id in generation_config.json",
        )
    known = set(table.texts)
    for eos_id in eos_ids:
        if eos_id >= len(table.texts) or table.types[eos_id] == TokenType.UNUSED:
            raise LoraError(
                f"--to gguf: the model has EOS id {eos_id}, but the tokenizer has no such token",
                hint="fix eos_token_id in generation_config.json",
            )
        for text, others in NOT_EOG_WITH:
            if table.texts[eos_id] == text and others <= known:
                raise LoraError(
                    f"--to gguf: {text} is an EOS token of this model, but llama.cpp does not stop at it if the"
                    f" vocabulary also has {' and '.join(sorted(others))}",
                    hint="remove it from eos_token_id in generation_config.json, if the model does not need it",
                )
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_ids[0]
    rest = sorted((eos_id for eos_id in eos_ids if eos_id != eos), key=lambda eos_id: table.texts[eos_id] in EOG_TEXTS)
    if lost := [table.texts[eos_id] for eos_id in rest[2:] if table.texts[eos_id] not in EOG_TEXTS]:
        raise LoraError(
            f"--to gguf: the model has {len(eos_ids)} EOS tokens; GGUF cannot store {', '.join(lost)}",
            hint="list fewer in generation_config.json: eos_token_id",
        )
    return {"eos_token_id": eos, **dict(zip(("eot_token_id", "eom_token_id"), rest, strict=False))}


def _chat_templates(template: str | Mapping[str, str]) -> str | list[dict[str, str]]:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]


def _has_phi3_rstrip(tokenizer_json: Mapping[str, Any]) -> bool:
    """Return whether exactly those added tokens have `rstrip` that llama.cpp strips after in a model named Phi 3."""
    rstrip = {entry["content"]: entry["rstrip"] for entry in tokenizer_json["added_tokens"]}
    stripping = {text for text, strips in rstrip.items() if strips}
    return (
        "</s>" in stripping
        and rstrip.keys() >= PHI3_WITHOUT_RSTRIP
        and stripping == rstrip.keys() - PHI3_WITHOUT_RSTRIP
    )


def _flag_notes(tokenizer_json: Mapping[str, Any]) -> list[str]:
    flagged = [
        entry["content"]
        for entry in tokenizer_json["added_tokens"]
        if entry["lstrip"] or entry["single_word"] or (entry["rstrip"] and not _has_phi3_rstrip(tokenizer_json))
    ]
    return [f"llama.cpp ignores lstrip, rstrip and single_word of {', '.join(flagged)}"] if flagged else []
