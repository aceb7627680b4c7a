"""Columns that change the meaning of a row (KTO labels, preference pairs, images, loss masks, weights): refuse them.

A row of another kind that is read as a plain example would teach what it was not made for: bad answers, or answers
about an image that the model never sees. No tokenizer, no torch.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from lora_cli.data.conversation import Conversation
from lora_cli.data.readers import quote
from lora_cli.data.records import BadRow
from lora_cli.recipe.tasks import FormatName

# Formats whose rows have an answer, which another column can mark as a bad one.
ANSWER_FORMATS = {"messages", "sharegpt", "alpaca", "prompt-completion", "query-response", "segments"}


@cache
def _normalized(name: str) -> str:
    """Return one form for `rejected_response`, `rejectedResponse` and `Rejected-Response`."""
    return re.sub(r"[\W_]+", "", name.lower())


def _names(text: str) -> frozenset[str]:
    return frozenset(map(_normalized, text.split()))


CHOSEN = _names(
    "chosen chosen_response chosen_answer chosen_output chosen_completion chosen_messages chosen_conversation"
    " preferred preferred_output preferred_response preferred_answer preferred_completion"
    " response_chosen answer_chosen winner winning_response better better_response better_answer good_answer response_j"
)
REJECTED = _names(
    "rejected rejected_response rejected_answer rejected_output rejected_completion rejected_messages"
    " rejected_conversation dispreferred dispreferred_output dispreferred_response non_preferred non_preferred_output"
    " non_preferred_response nonpreferred response_rejected answer_rejected loser losing_response worse worse_response"
    " worse_answer bad_answer response_k negative_response"
)
# Two answers to one prompt, of which another column may say which is better.
ANSWER_PAIRS = tuple(
    _names(f"{name}{a} {name}{b}")
    for name in ("response", "answer", "completion", "output", "conversation")
    for a, b in (("a", "b"), ("0", "1"), ("1", "2"))
)
GOOD_FLAGS = _names(
    "label kto_tag desirable is_desirable is_good good is_correct correct accepted is_accepted is_chosen is_preferred"
    " thumbs_up upvoted is_helpful"
)
# Of these, the ones that can only be flags, so that 0 is false; a label 0 is a class.
GOOD_NUMBERS = _names("kto_tag desirable is_desirable is_good is_correct is_accepted is_chosen is_preferred is_helpful")
BAD_FLAGS = _names("rejected is_rejected is_bad undesirable is_undesirable thumbs_down downvoted is_incorrect")
BAD_NUMBERS = _names("is_rejected is_bad undesirable is_undesirable is_incorrect")
# Loss flags of a turn, on the row.
TRAIN_FLAGS = _names("train is_train trainable training")
FEEDBACK = _names("feedback user_feedback label kto_tag rating")
BAD_FEEDBACK = {"undesirable", "thumbs_down", "thumbs-down", "thumbsdown", "downvote", "dislike", "rejected"}
MEDIA = {
    "image": _names(
        "image images image_path image_paths image_url image_urls image_file image_files image_base64 image_bytes img"
        " imgs picture pictures pixel_values"
    ),
    "video": _names("video videos video_path video_paths video_url video_urls video_file pixel_values_videos"),
    "audio": _names("audio audios audio_path audio_paths audio_url audio_urls audio_file speech input_features"),
}
_MEDIUM = {name: medium for medium, names in MEDIA.items() for name in names}
ONE_OF = {"image": "an image", "video": "a video", "audio": "audio"}
LOSS_MASKS = _names(
    "loss_mask mask completion_mask assistant_mask assistant_masks answer_mask response_mask prompt_mask"
    " label_mask loss_weights token_weights"
)
LABELS = _names("labels")
SAMPLE_WEIGHTS = _names("weight sample_weight example_weight loss_weight row_weight importance_weight")
POSITIONS = _names("position_ids")
LENGTHS = _names("seq_lengths seq_lens sequence_lengths cu_seqlens")


class _Kind(NamedTuple):
    """Columns of one kind."""

    names: frozenset[str]  # normalized
    changes: Callable[[Any], bool]  # whether a value that is not empty changes the meaning of the row
    reason: str  # for the ledger
    problem: str  # for the message; {value} is the column's value
    hint: str  # {column} is the column's name
    formats: frozenset[str] | None = None  # None: all


def _is_false(value: object) -> bool:
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _is_true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() == "true")


def _is_number(value: object, number: int) -> bool:
    if isinstance(value, str):  # tables without types
        return value.strip() in (str(number), f"{number}.0")
    return isinstance(value, int | float) and value == number


def _is_bad_feedback(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower().replace(" ", "_") in BAD_FEEDBACK


def _is_answer(value: object) -> bool:
    return isinstance(value, str | list | dict) and not _is_true(value) and not _is_false(value)


def _is_mask(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(each, int | float) and each != 1 for each in value)


def _has_ignored_labels(value: object) -> bool:
    return isinstance(value, list) and -100 in value  # other lists are classes


def _is_weight(value: object) -> bool:
    if isinstance(value, str):  # tables without types
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, int | float) and not isinstance(value, bool) and value != 1


def _is_restarting(value: object) -> bool:
    return isinstance(value, list) and value != list(range(len(value)))


IGNORE = "data.columns: {{{column}: null}} leaves the column out on purpose"
GOOD_ONLY = (
    "to learn the good answers only: data: {{on_bad_row: skip, max_loss: 1.0}}, which drops and counts the others; "
    + IGNORE
)
_ANSWERS = frozenset(ANSWER_FORMATS)
_TOKENS = frozenset({"tokens"})
KINDS: tuple[_Kind, ...] = (
    _Kind(
        GOOD_FLAGS,
        _is_false,
        "bad answer",
        "is {value}: the answer is marked as a bad one (as in KTO)",
        GOOD_ONLY,
        _ANSWERS,
    ),
    _Kind(
        GOOD_NUMBERS,
        lambda value: _is_number(value, 0),
        "bad answer",
        "is {value}: the answer is marked as a bad one (as in KTO)",
        GOOD_ONLY,
        _ANSWERS,
    ),
    _Kind(BAD_FLAGS, _is_true, "bad answer", "is {value}: the answer is marked as a bad one", GOOD_ONLY, _ANSWERS),
    _Kind(
        BAD_NUMBERS,
        lambda value: _is_number(value, 1),
        "bad answer",
        "is {value}: the answer is marked as a bad one",
        GOOD_ONLY,
        _ANSWERS,
    ),
    _Kind(
        TRAIN_FLAGS,
        lambda value: _is_false(value) or _is_number(value, 0),
        "row without loss",
        "is {value}: the row is marked as one that carries no loss",
        "data: {{on_bad_row: skip, max_loss: 1.0}} drops and counts these rows; " + IGNORE,
    ),
    _Kind(
        FEEDBACK, _is_bad_feedback, "bad answer", "is {value}: the answer is marked as a bad one", GOOD_ONLY, _ANSWERS
    ),
    *(
        _Kind(
            names,
            lambda value: value is not False,
            f"row with {medium}",
            f"the row has {ONE_OF[medium]}, which a text model does not see",
            "data.columns: {{{column}: null}} trains on the text alone; data.on_bad_row: skip drops these rows",
        )
        for medium, names in MEDIA.items()
    ),
    *(
        _Kind(
            names,
            changes,
            "loss mask",
            "is a mask of the tokens that carry loss, which this format does not read",
            "write rows of format tokens: input_ids, and labels with -100 for a token without loss; " + IGNORE,
        )
        for names, changes in ((LOSS_MASKS, _is_mask), (LABELS, _has_ignored_labels))
    ),
    _Kind(
        POSITIONS,
        _is_restarting,
        "packed row",
        "does not count from 0: the row is packed already",
        "write each document as a row of its own: data.packing packs them; " + IGNORE,
        _TOKENS,
    ),
    _Kind(
        LENGTHS,
        lambda value: isinstance(value, list) and len(value) > 1,
        "packed row",
        "lists several lengths: the row is packed already",
        "write each document as a row of its own: data.packing packs them; " + IGNORE,
        _TOKENS,
    ),
    _Kind(
        SAMPLE_WEIGHTS,
        _is_weight,
        "weight of a row",
        "is {value}: rows have no weights of their own",
        "a source has one: list the rows of each weight as a source of data.train with `weight`; " + IGNORE,
    ),
)
_BY_NAME: dict[str, tuple[_Kind, ...]] = {
    name: tuple(kind for kind in KINDS if name in kind.names) for kind in KINDS for name in kind.names
}


def is_empty(value: object) -> bool:
    """Return whether a value says nothing: null, an empty text, list or object, or an object of such values."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value == ""


def check_row_kind(
    row: Mapping[str, Any], *, unread: Iterable[str], format_: FormatName | None, columns: Mapping[str, str | None]
) -> None:
    """Check that no column that the format does not read changes the meaning of the row.

    Args:
        row: a row, with columns renamed.
        unread: its columns that the format does not read.
        format_: of the row, None if no known one fits.
        columns: data.columns; a pair of answers is accepted if the good one is mapped.

    Raises:
        BadRow: one does.
    """
    filled = [name for name in unread if _normalized(name) in _WATCHED and not is_empty(row[name])]
    if not filled:
        return
    for name in filled:
        for kind in _BY_NAME.get(_normalized(name), ()):
            if (kind.formats is None or format_ in kind.formats) and kind.changes(row[name]):
                value = row[name]
                written = json.dumps(value) if isinstance(value, bool) else quote(value)
                problem = kind.problem.format(value=written)
                raise BadRow(kind.reason, problem, field=name, hint=kind.hint.format(column=name))
    if format_ is not None and format_ not in ANSWER_FORMATS:
        return
    if any(_normalized(column) in CHOSEN for column in columns.values() if column is not None):
        return
    answers = {_normalized(name): name for name in filled if _is_answer(row[name])}
    if rejected := next((name for key, name in answers.items() if key in REJECTED), None):
        chosen = next((name for key, name in answers.items() if key in CHOSEN), None)
        problem = "is the worse of two answers (a preference pair), which supervised fine-tuning does not use"
        raise BadRow(PREFERENCE, problem, field=rejected, hint=_preference_hint(row, chosen, rejected))
    for pair in ANSWER_PAIRS:
        if pair <= answers.keys():
            first, second = (answers[key] for key in sorted(pair))
            problem = "are two answers to one prompt, of which supervised fine-tuning uses one"
            hint = f"to learn the first: data.columns maps {first}, for example {{output: {first}, {second}: null}}"
            raise BadRow(PREFERENCE, problem, field=f"{first}, {second}", hint=hint)


PREFERENCE = "preference pair"
_WATCHED = frozenset(_BY_NAME) | CHOSEN | REJECTED | frozenset().union(*ANSWER_PAIRS)


def _preference_hint(row: Mapping[str, Any], chosen: str | None, rejected: str) -> str:
    """Return how to train on the good answers of preference rows such as `row`."""
    start = "to train on the chosen answers"
    if chosen is None:
        return f"{start}: data.columns: {{{rejected}: null}}"
    answer = row[chosen]
    prompt = next((name for name in PROMPTS if isinstance(row.get(name), str)), None)
    if isinstance(answer, str) and prompt:
        others = "".join(f", {name}: null" for name in ("output", "completion", "messages") if name in row)
        mapping = ", ".join(([] if prompt == "instruction" else [f"instruction: {prompt}"]) + [f"output: {chosen}"])
        return f"{start}: format: alpaca, columns: {{{mapping}{others}}}"
    if isinstance(answer, str):
        return f"{start}, with their prompts: format: text, columns: {{text: {chosen}}}"
    if isinstance(answer, list) and isinstance(row.get("prompt"), list):
        return f"{start}: format: prompt-completion, columns: {{completion: {chosen}}}"
    if isinstance(answer, list) and len(answer) > 1:
        return f"{start}: format: messages, columns: {{messages: {chosen}}}"
    return f"{start}: write rows of messages that end with {chosen}"


PROMPTS = ("prompt", "instruction", "question", "query", "input", "problem")

# Texts that stand for an image, video or audio. In <image> style they may also be tags of HTML or XML, and are
# placeholders only at the start or end of a line of a prompt, without a closing tag.
_TOKENS_OF_MEDIA = re.compile(
    r"<\|(?:image|video|audio)(?:_pad)?\|>|<\|vision_start\|>|<image_soft_token>|<start_of_image>|<IMG_CONTEXT>"
)
_TAG = re.compile(r"(?:(?<![^\n])[ \t]*<(image|video|audio)>|<(image|video|audio)>[ \t]*(?![^\n]))")


def check_media(example: object, *, columns: Mapping[str, str | None]) -> None:
    """Check that no message has an image, video or audio, and that no prompt contains the placeholder of one.

    Raises:
        BadRow: one does, and data.columns does not map a column of that medium to null.
    """
    left_out = {_normalized(name) for name, column in columns.items() if column is None}
    for message in example.messages if isinstance(example, Conversation) else ():
        for key, value in message.items():
            medium = _MEDIUM.get(_normalized(key)) if not is_empty(value) and value is not False else None
            if medium and not left_out & MEDIA[medium]:
                problem = f"has {key}: {ONE_OF[medium]}, which a text model does not see"
                hint = f"data.columns: {{{key}: null}} trains on the text alone; data.on_bad_row: skip drops these rows"
                raise BadRow(f"row with {medium}", problem, field=f"the {message['role']} message", hint=hint)
    for field, text in _prompts(example):
        if "<" not in text:
            continue
        for match in (_TOKENS_OF_MEDIA.search(text), _TAG.search(text)):
            if match is None:
                continue
            tag = next(filter(None, match.groups()), None) if match.re is _TAG else None
            medium = tag or next((name for name in MEDIA if name in match[0].lower()), "image")
            if left_out & MEDIA[medium] or (tag and f"</{tag}>" in text):
                continue
            problem = f"contains {match[0].strip()}, which stands for {ONE_OF[medium]}"
            hint = f"data.on_bad_row: skip drops these rows; data.columns: {{{medium}: null}} keeps it as text"
            raise BadRow(f"row with {medium}", problem, field=field, hint=hint)


def _prompts(example: object) -> Iterable[tuple[str, str]]:
    """Yield the texts of an example that are not answers, with their fields."""
    if isinstance(example, Conversation):
        for message in example.messages:
            if message["role"] in {"system", "developer", "user"}:
                yield f"the {message['role']} message", message["content"]
    else:
        for field in ("prompt", "text"):
            if isinstance(text := getattr(example, field, None), str):
                yield field, text
