"""`lora chat`: chat with a base and its adapters, all on one loaded base; answers are streamed token by token."""

import os
import signal
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jinja2 import TemplateSyntaxError
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_cli.data.check_template import checked_template
from lora_cli.data.encode import prefix_tokens
from lora_cli.data.records import BadRow
from lora_cli.data.rendering import render_template
from lora_cli.errors import LoraError
from lora_cli.evaluation.generation import StopOnSignal, check_prompt_ids, stop_ids
from lora_cli.model.multimodal import placeholder_tokens
from lora_cli.run import atomic, console
from lora_cli.run.folder import BASE
from lora_cli.run.signals import at_end, stop_request
from lora_cli.setup.chat_model import DESCRIPTIONS, PROMPT_KINDS, LoadedChat, Prompting, PromptKind, load_chat

HELP = """\
/use NAME    answer with an adapter          /base        answer with the base alone
/compare     base and adapter answer the last question; /compare TEXT: they answer TEXT
/prompt KIND chat (the chat template) or text (each line is the whole prompt)
LINE\\        a line that ends with a backslash goes on in the next line
/reset       clear the conversation          /system TEXT  set the system message, and clear
/save FILE   write the conversation          /quit        leave"""
WITHOUT_TEXT = ("/base", "/reset", "/help", "/quit", "/exit")  # commands that take no text


class ChatOptions(NamedTuple):
    """Options of answer generation."""

    temperature: float
    max_new_tokens: int
    system: str | None
    seed: int


class Chat:
    """A conversation with one loaded base and its adapters."""

    def __init__(self, loaded: LoadedChat, options: ChatOptions) -> None:
        """The first adapter of `loaded` answers."""
        self._model: Any = loaded.model
        self._tokenizer, self._adapters, self._options = loaded.tokenizer, loaded.adapters, options
        self._names = list(loaded.prompting)
        self._prompting, self._chosen = loaded.prompting, cast(PromptKind | None, None)
        self.active = self._names[0] if self._names else BASE
        self._system = options.system
        self.messages: list[dict[str, str]] = []
        base = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        self._stop_ids = stop_ids(self._tokenizer, base, self._template_endings())
        self._placeholders = placeholder_tokens(base.config, self._tokenizer)
        self.reset()

    def reset(self) -> None:
        """Clear the conversation."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def handle_line(self, line: str) -> bool:
        """Handle one input, a command or a question without its line end; return False to quit."""
        word, *others = line.split(maxsplit=1) or [""]
        rest = others[0].strip() if others else ""
        if rest and word in WITHOUT_TEXT:
            console.info(f"{word} takes no text, and was not done: {rest!r} is left over")
            return True
        match word:
            case "":
                return True
            case "/quit" | "/exit":
                return False
            case "/help":
                _print_help()
            case "/base":
                self._use(BASE)
            case "/use":
                self._use(rest)
            case "/prompt":
                self._choose_prompts(rest)
            case "/reset":
                self.reset()
            case "/system":
                self._set_system(rest or None)
            case "/save":
                self._save(rest)
            case "/compare":
                self._compare(rest)
            case _ if word.startswith("/"):
                console.info(f"{word} is not a command")
                _print_help()
            case _:
                # Of a literal prompt, spaces and empty lines at its ends are a part.
                text = line.strip() if self._kind() == "chat" else line
                question = {"role": "user", "content": text}
                try:
                    answer = self._answer(self.active, [*self.messages, question])
                except LoraError as error:
                    console.info(f"{error.message}; {error.hint}")
                else:
                    self.messages += [question, {"role": "assistant", "content": answer}]
        return True

    def _kind(self) -> PromptKind:
        """Return how lines are prompts: as chosen by /prompt, else as the active adapter was trained."""
        if self._chosen is not None:
            return self._chosen
        return self._prompting_of(self.active).kind

    def _prompting_of(self, name: str) -> Prompting:
        """Return how an adapter is prompted; the base is prompted as the first adapter."""
        if not self._names:
            return Prompting("chat" if self._tokenizer.chat_template else "text")
        return self._prompting.get(name, self._prompting[self._names[0]])

    def _choose_prompts(self, kind: str) -> None:
        if kind and kind not in PROMPT_KINDS:
            console.info(f"/prompt {kind}: write /prompt chat or /prompt text")
        elif kind == "chat" and not self._tokenizer.chat_template:
            console.info("/prompt chat: the tokenizer has no chat template")
        else:
            self._chosen = PROMPT_KINDS[kind] if kind else self._chosen
            console.info(DESCRIPTIONS[self._kind()])

    def _set_system(self, text: str | None) -> None:
        if text and self._kind() == "text":
            console.info("/system: literal prompts have no system message; /prompt chat uses the chat template")
            return
        self._system = text
        self.reset()

    def _use(self, name: str) -> None:
        if name not in (BASE, *self._names):
            found = f"there is no adapter {name!r}" if name else "/use needs a name"
            console.info(f"{found}; available: {', '.join([BASE, *self._names])}")
            return
        before = self._kind()
        start = time.perf_counter()
        if name != BASE and self._adapters is not None:
            self._adapters.activate(name)
        self.active = name
        changed = f"; {DESCRIPTIONS[self._kind()]}" if self._kind() != before else ""
        console.info(f"{name} answers now (switched in {(time.perf_counter() - start) * 1000:.0f} ms{changed})")

    def _compare(self, text: str) -> None:
        """Answer `text`, or the last question, with the base and with the adapter; the conversation does not change."""
        questions = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not questions and not text:
            console.info("there is no question yet")
            return
        messages = [*self.messages, {"role": "user", "content": text}] if text else self.messages[: questions[-1] + 1]
        adapter = self.active if self.active != BASE else next(iter(self._names), None)
        try:
            for name in (BASE, *([adapter] if adapter else [])):
                sys.stdout.write(f"[{name}] ")
                self._answer(name, messages)
        except LoraError as error:
            console.info(f"{error.message}; {error.hint}")

    def _save(self, file: str) -> None:
        if not file or not Path(file).absolute().parent.is_dir():
            console.info("/save needs the name of a file, in a folder that exists")
            return
        atomic.write_json(Path(file), {"messages": self.messages})
        console.info(f"saved in {file}")

    @torch.no_grad()
    def _answer(self, name: str, messages: Sequence[dict[str, str]]) -> str:
        """Write the answer to stdout while it is generated, and return it. Ctrl-C ends it."""
        prompting = self._prompting_of(self.active if name == BASE else name)
        prompt = self._prompt_ids(messages, self._kind(), prompting.template)
        base = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        check_prompt_ids(prompt, base, self._tokenizer)
        ids = torch.tensor([prompt], device=next(self._model.parameters()).device)
        streamer = CollectingStreamer(self._tokenizer)
        options = self._options
        config = GenerationConfig(
            do_sample=options.temperature > 0,
            temperature=options.temperature or None,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=self._stop_ids or None,
            pad_token_id=self._stop_ids[0] if self._stop_ids else 0,
            suppress_tokens=self._placeholders or None,
        )
        model: Any = self._model
        if name != BASE and self._adapters is not None:
            self._adapters.activate(name)
        adapter_off = model.disable_adapter() if isinstance(model, PeftModel) and name == BASE else nullcontext()
        with adapter_off, stop_request(signal.SIGINT) as stop:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([_check_logits]),
                streamer=streamer,
                stopping_criteria=[StopOnSignal(stop.is_set)],
            )
        if stop.is_set():
            console.info("")
            console.info("(stopped)")
        sys.stdout.write("\n")
        sys.stdout.flush()
        return "".join(streamer.parts).strip()

    def _prompt_ids(
        self, messages: Sequence[dict[str, str]], kind: PromptKind = "chat", template: str | None = None
    ) -> list[int]:
        if kind == "text":
            text: list[int] = self._tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
            prefix = prefix_tokens(self._tokenizer)
            return text if text[: len(prefix)] == prefix and prefix else [*prefix, *text]
        ids: list[int] = self._tokenizer(self._rendered(messages, template), add_special_tokens=False)["input_ids"]
        return ids

    def _rendered(
        self, messages: Sequence[dict[str, str]], source: str | None = None, *, generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the template `source`, else the tokenizer's, writes it.

        Raises:
            LoraError: the template rejects it, or does not end on it.
        """
        try:
            source = source or self._tokenizer.get_chat_template()
            template = checked_template("the chat template", source, self._tokenizer.special_tokens_map)
            return render_template(template, list(messages), generation_prompt=generation_prompt)
        except (BadRow, TemplateSyntaxError, ValueError) as error:  # ValueError: several templates and no default
            first_line = (error.problem if isinstance(error, BadRow) else str(error)).partition("\n")[0]
            reason = first_line.removeprefix("the chat template rejects the row: ")
            raise LoraError(
                f"the chat template rejects this conversation: {reason}", hint="change it with /system or /reset"
            ) from None

    def _template_endings(self) -> list[list[int]]:
        """Return the token ids with which the chat template ends an answer, up to the first special token."""
        if self._tokenizer.chat_template is None:
            return []
        question = [{"role": "user", "content": "a"}]
        before = self._prompt_ids(question)
        chat = [*question, {"role": "assistant", "content": "b"}]
        text = self._rendered(chat, generation_prompt=False)
        full: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        special = set(self._tokenizer.all_special_ids)
        special |= {id_ for id_, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        after = full[len(before) :] if full[: len(before)] == before else []
        first = next((number for number, id_ in enumerate(after) if id_ in special), None)
        return [after[: first + 1]] if first is not None else []


def _print_help() -> None:
    for line in HELP.splitlines():
        console.info(line)


def _check_logits(_: Tensor, logits: Tensor) -> Tensor:
    """Return the logits of the next token, [1, vocab] of a floating dtype.

    Raises:
        LoraError: one is NaN; the most likely token would be an arbitrary one.
    """
    if logits.isnan().any():
        raise LoraError("the model computes no numbers (NaN)", hint="its weights are damaged or too large")
    return logits


class CollectingStreamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Write an answer to stdout while it is generated, and collect it in `parts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.parts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text that will not change any more; called by transformers."""
        self.parts.append(text)
        sys.stdout.write(console.visible(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def chat(
    target: Path, *, adapters: Sequence[str], base_path: str | None, options: ChatOptions, other_base: bool = False
) -> None:
    """Answer stdin, line by line.

    Args:
        target: a run, adapter or model folder, or a .gguf file.
        adapters: further adapters of the same base, `DIR` or `NAME=DIR`.
        base_path: base in place of the one that the adapter names.
        options: of answer generation.
        other_base: whether the base may have other weights than those that an adapter was trained on.

    Raises:
        LoraError: an adapter or model does not exist, does not fit its base, or is not a language model.
    """
    loaded = load_chat(target, adapters, base_path, other_base=other_base)
    loaded.model.eval()
    conversation = Chat(loaded, options)
    torch.manual_seed(options.seed)
    for note in loaded.notes:
        console.info(note)
    if options.system and loaded.kinds == {"text"}:
        console.info("--system has no effect: literal prompts have no system message")
    if sys.stdin.isatty():
        console.info(f"{conversation.active} answers; /help lists the commands")
    for line in _lines(conversation):
        if not conversation.handle_line(line):
            break


def _lines(conversation: Chat) -> Iterator[str]:
    """Yield the lines of stdin without their ends; lines that end with a backslash are joined with the next one."""
    parts: list[str] = []
    while (line := _read_line("... " if parts else f"{conversation.active}> ")) is not None:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts = []
    if parts:
        yield "\n".join(parts)


def _read_line(prompt: str) -> str | None:
    """Return the next line of stdin; None at its end. `prompt` is shown on a terminal.

    Raises:
        LoraError: the line is not text in the encoding of stdin.
    """
    if not sys.stdin.isatty():
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise _not_text(error.encoding, error.object[error.start]) from None
        if (byte := _undecoded_byte(line)) is not None:
            raise _not_text(sys.stdin.encoding, byte)
        return line.rstrip("\r\n") if line else None
    import readline  # noqa: F401 - its import gives input() editing and history

    terminal = termios.tcgetattr(0)  # readline changes its modes while it reads
    try:
        with at_end(lambda: _leave_prompt(terminal)):
            while (byte := _undecoded_byte(line := input(prompt))) is not None:
                console.info(_not_text(sys.stdin.encoding, byte).message)
            return line
    except EOFError:
        console.info("")
        return None


def _undecoded_byte(line: str) -> int | None:
    """Return the first byte of a line that is not text; Python has a half of a pair in its place."""
    return next((ord(each) - 0xDC00 for each in line if "\udc80" <= each <= "\udcff"), None)


def _not_text(encoding: str, byte: int) -> LoraError:
    return LoraError(
        f"standard input is not {encoding} text: byte {byte:#04x}",
        hint="convert it to UTF-8; PYTHONIOENCODING=utf-8 reads UTF-8 whatever the locale is",
    )


def _leave_prompt(terminal: list[Any]) -> None:
    termios.tcsetattr(0, termios.TCSANOW, terminal)
    os.write(2, b"\n")
