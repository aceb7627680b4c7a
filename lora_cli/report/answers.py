"""Answers of base and adapter to the same prompts, from answers.jsonl and from the JSON of `lora eval`. No torch."""

from itertools import groupby
from typing import NamedTuple

from lora_cli.report.recorded_run import Json, RecordedRun, as_list, as_number, as_object
from lora_cli.run.folder import BASE

MAX_PROMPTS = 20  # shown of each source
MAX_MASK_ROWS = 5


class ModelAnswer(NamedTuple):
    """The answer of one model to a prompt."""

    model: str  # base, adapter, step 40
    text: str
    finished: bool


class PromptAnswers(NamedTuple):
    """A prompt with the answers of all models."""

    where: str  # its row
    prompt: str
    references: list[str]
    answers: list[ModelAnswer]


class AnswerSource(NamedTuple):
    """The answers of one file."""

    caption: str
    prompts: list[PromptAnswers]
    left_out: int  # prompts that are not shown


def answer_sources(run: RecordedRun) -> list[AnswerSource]:
    """Return all answers that a run or an evaluation has left."""
    sources = []
    if run.answers:
        sources.append(_limited("During training (answers.jsonl)", _of_training(run)))
    for measured in run.measurements:
        records = [as_object(each) for each in as_list(measured.content.get("answers"))]
        if records:
            sources.append(_limited(f"lora eval ({measured.file})", [_of_record(each) for each in records]))
    return sources


def _limited(caption: str, prompts: list[PromptAnswers]) -> AnswerSource:
    return AnswerSource(caption, prompts[:MAX_PROMPTS], max(0, len(prompts) - MAX_PROMPTS))


def _of_training(run: RecordedRun) -> list[PromptAnswers]:
    """Return the answers during training, those before and after the training first."""
    by_prompt: dict[tuple[str, str], list[Json]] = {}
    for record in run.answers:
        by_prompt.setdefault((str(record.get("where")), str(record.get("prompt"))), []).append(record)
    first = "start" if run.starts_from_adapter else BASE
    return [
        PromptAnswers(
            where,
            prompt,
            _texts(records[0].get("references")),
            [
                ModelAnswer(
                    first if record["step"] == 0 else f"step {record['step']:,}",
                    str(record.get("answer")),
                    record.get("finished") is not False,
                )
                for record in [records[0], *records[-1:0:-1]]
            ],
        )
        for (where, prompt), records in by_prompt.items()
    ]


def _of_record(record: Json) -> PromptAnswers:
    answers = [
        ModelAnswer(name, str(as_object(answer).get("text")), as_object(answer).get("finished") is not False)
        for name, answer in as_object(record.get("answers")).items()
    ]
    return PromptAnswers(str(record.get("where")), str(record.get("prompt")), _texts(record.get("references")), answers)


def _texts(value: object) -> list[str]:
    return [str(each) for each in as_list(value)]


class MaskRow(NamedTuple):
    """A row token by token, grouped by whether the tokens carry loss."""

    where: str
    spans: list[tuple[bool, list[str]]]
    left_out: int  # tokens at its end


def mask_rows(run: RecordedRun) -> list[MaskRow]:
    """Return the first rows of the run with their label mask; empty if the run has not recorded them."""
    rows = [as_object(each) for each in as_list(run.manifest.get("label_mask"))[:MAX_MASK_ROWS]]
    return [MaskRow(str(row.get("where")), _spans(row), int(as_number(row.get("left_out")) or 0)) for row in rows]


def _spans(row: Json) -> list[tuple[bool, list[str]]]:
    """Return the tokens of a row of the manifest, grouped; those of a damaged one as far as they are text."""
    tokens = [text for text in as_list(row.get("tokens")) if isinstance(text, str)]
    supervised = [False] * len(tokens)
    for span in map(as_list, as_list(row.get("loss"))):
        if len(span) == 2 and isinstance(span[0], int) and isinstance(span[1], int):
            for number in range(max(0, span[0]), min(span[1], len(tokens))):
                supervised[number] = True
    pairs = zip(supervised, tokens, strict=True)
    return [(carries, [text for _, text in group]) for carries, group in groupby(pairs, key=lambda pair: pair[0])]
