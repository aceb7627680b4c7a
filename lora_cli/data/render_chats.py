"""Render conversations with the spans of their answers for the encoder: many at a time, in the template process.

Everything that renders for a row is in one request of many rows, so that the process costs them almost nothing.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_cli.data.assistant_spans import AnswerCounts, AssistantFormat, Span, render_with_spans
from lora_cli.data.conversation import Conversation, Message
from lora_cli.data.flagged_spans import check_flags_of_answers_only, spans_without_loss
from lora_cli.data.infer_template import infer_template_format
from lora_cli.data.records import BadRow
from lora_cli.data.rendering import FIX_HINT, Template, render_template, template_process
from lora_cli.data.template_variables import check_row_names
from lora_cli.data.tool_schemas import ToolSchema, check_tools_rendered
from lora_cli.errors import LoraError
from lora_cli.run.child_process import Ended, mark, restart_time_limit

NO_COUNTS = AnswerCounts()
BLOCK = 1 << 16  # characters of rows that are sent together
MAX_STOPPED = 3  # rows of a source on which the template may be stopped: each of them takes the whole time limit
UNUSABLE_VARIABLES = "unusable template variables"


class UntokenizedRow(NamedTuple):
    """The text of a row and the spans of its answers."""

    text: str
    answers: list[Span]  # in characters
    plain: bool  # no chat template: BOS and EOS have to be added
    all_tokens: bool  # every token carries loss
    counts: AnswerCounts = NO_COUNTS
    silent: Sequence[Span] = ()  # in characters: within the answers, without loss
    labeled: bool = False  # segments: labels are the only mask, and EOS is not added behind another special token


class ChatOptions(NamedTuple):
    """What the rendering of a conversation depends on, beside the conversation."""

    templates: Mapping[bool, Template]  # by whether the conversation has tools
    special: tuple[str, ...]  # texts of the tokenizer's special tokens
    added: tuple[str, ...]  # texts of its added tokens that are not special, but written as tags
    bos: str | None  # text of its BOS token
    all_tokens: bool  # data.loss_on: all

    @property
    def name(self) -> str:
        """Name of the template in messages."""
        return next(iter(self.templates.values())).name


class ChatRendering:
    """Conversations that the template process is rendering; `rows` waits for them.

    A class, because the encoder does other work between the start and the result.
    """

    def __init__(self, options: ChatOptions, chats: Sequence[Conversation], stopped: list[BadRow]) -> None:
        """`stopped` are the rows of the encoder so far on which the template was stopped; more are added to it."""
        self._options, self._chats, self._stopped = options, chats, stopped
        self._rows: list[UntokenizedRow | BadRow] | None = None
        self._blocks = template_process().stream(render_chats, options, chats) if chats else iter(())

    def rows(self) -> list[UntokenizedRow | BadRow]:
        """Return the row of each conversation, or why it cannot be used.

        Raises:
            LoraError: the template cannot be used for training, or was stopped on too many rows.
        """
        if self._rows is None:
            self._rows = self._wait()
        return self._rows

    def _wait(self) -> list[UntokenizedRow | BadRow]:
        rows: list[UntokenizedRow | BadRow] = []
        chats: list[Conversation | BadRow] = list(self._chats)
        first = 0  # of the request
        while True:
            try:
                for block in self._blocks:
                    rows += block
                return rows
            except Ended as ended:
                if len(self._stopped) == MAX_STOPPED:
                    raise LoraError(f"{self._options.name} {ended.detail} on several rows", hint=FIX_HINT) from None
                bad = BadRow("too much for the chat template", f"the chat template {ended.detail} on this row")
                self._stopped.append(bad)
                chats[first + ended.place] = bad
                first = len(rows)
                self._blocks = template_process().stream(render_chats, self._options, chats[first:])


def render_chats(
    options: ChatOptions, chats: Sequence[Conversation | BadRow]
) -> Iterator[list[UntokenizedRow | BadRow]]:
    """Render conversations, in the template process; yield blocks of results, in order.

    A bad row is its own result: one on which the process was stopped before.

    Raises:
        LoraError: the template cannot be used for training.
    """
    renderer = _renderers.setdefault(repr(options), ChatRenderer(options))
    block: list[UntokenizedRow | BadRow] = []
    size = 0
    for number, chat in enumerate(chats):
        mark(number)
        restart_time_limit()
        row = chat if isinstance(chat, BadRow) else renderer.render(chat)
        block.append(row)
        size += len(row.text) if isinstance(row, UntokenizedRow) else 0
        if size > BLOCK:
            yield block
            block, size = [], 0
    yield block


_renderers: dict[str, "ChatRenderer"] = {}  # of this process, by their options


class ChatRenderer:
    """Renders conversations with the templates of a recipe.

    A class, because the format of a template is inferred once for all rows.
    """

    def __init__(self, options: ChatOptions) -> None:
        self._options = options
        self._formats: dict[tuple[bool, str], AssistantFormat] = {}  # by tools and template variables
        self._unusable: dict[tuple[bool, str], str] = {}  # the same: why the template cannot be used

    def render(self, chat: Conversation) -> UntokenizedRow | BadRow:
        """Return the text and spans of a conversation.

        Raises:
            LoraError: the template cannot be used for training.
        """
        try:
            format_ = self._format_of(chat)
            text, turns, counts = render_with_spans(format_, chat)
            if chat.tools:
                _check_tools(format_, chat.messages, chat.tools, text)
            silent = spans_without_loss(chat, text, turns, format_.end_tokens)
            if self._options.all_tokens:
                check_flags_of_answers_only(chat)
        except BadRow as bad:
            return bad
        return UntokenizedRow(
            text, turns, plain=False, all_tokens=self._options.all_tokens, counts=counts, silent=silent
        )

    def _format_of(self, chat: Conversation) -> AssistantFormat:
        tools = chat.tools is not None
        key = (tools, json.dumps(chat.variables, sort_keys=True, default=str) if chat.variables else "")
        if key in self._unusable:
            raise BadRow(UNUSABLE_VARIABLES, self._unusable[key])
        if key not in self._formats:
            template = self._options.templates[tools]
            check_row_names(chat.variables, template.source)
            variables = {**template.variables, **chat.variables}
            try:
                self._formats[key] = self._infer_format(template._replace(variables=variables))
            except LoraError as error:
                if not chat.variables:
                    raise
                # Other rows can have other variables.
                self._unusable[key] = f"{error.message} (with {_listed(chat.variables)})"
                raise BadRow(UNUSABLE_VARIABLES, self._unusable[key]) from None
        format_ = self._formats[key]
        if tools and not format_.supports_tools:
            raise LoraError(
                f"data: rows have tools, but {format_.template.name} ignores them",
                hint="use a chat template that supports tools, or remove the tools column from the data",
            )
        return format_

    def _infer_format(self, template: Template) -> AssistantFormat:
        special, added = set(self._options.special), set(self._options.added)
        return infer_template_format(template, special=special, added=added, bos=self._options.bos)


def _check_tools(format_: AssistantFormat, messages: list[Message], tools: list[ToolSchema], text: str) -> None:
    try:
        without_tools = render_template(format_.template, messages)
    except BadRow:
        without_tools = ""  # the template accepts tool calls only together with tools
    check_tools_rendered(tools, text, without_tools=without_tools)


def _listed(variables: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {json.dumps(value, default=str)}" for name, value in variables.items())
