"""`--to ollama`: a folder with a GGUF file and the Modelfile that `ollama create` reads.

Ollama does not run the tokenizer's own chat template, which is in Jinja: it needs a template in Go's language. That one
is built here from the output of the tokenizer's (see `chat_template`), and compared with it chat by chat. Facts are
from Ollama's template/template.go and server/: it merges consecutive messages of one role; it puts SYSTEM in front of
chats that do not begin with a system message; if a chat is longer than num_ctx, it drops the oldest messages except
system messages; it adds BOS if the GGUF file requests it. Tools and reasoning are not covered. This project has never
run Ollama itself: the checks use an interpreter of Go's template language (see `go_template`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.export import probe_chats, reference
from lora_cli.export.gguf import model as gguf_format
from lora_cli.export.gguf import tokenizer
from lora_cli.export.ollama import chat_template, go_template, modelfile
from lora_cli.export.ollama.chat_template import TemplateParts
from lora_cli.export.ollama.modelfile import Instruction
from lora_cli.export.probe_chats import Messages
from lora_cli.export.source import Check, ExportOptions, ExportSource
from lora_cli.run.shell import shell_path

WEIGHTS_FILE, MODELFILE_NAME = "model.gguf", "Modelfile"
# Ollama allocates the KV cache of all num_ctx positions when it loads a model. If num_ctx is not set, Ollama chooses
# 4,096 positions or more, by the available memory. A model that has at most MAX_CONTEXT positions gets all of them; for
# larger models the choice is left to Ollama.
MAX_CONTEXT = 8192
# Rare orders of messages: a difference is reported, if the tokenizer's template accepts the order at all.
UNUSUAL_ORDERS = {
    "begin with an assistant message": "au",
    "end with an assistant message": "ua",
    "have a later system message": "uasu",
}


def check_supported(source: ExportSource, options: ExportOptions) -> None:
    """Raise a LoraError if the model cannot be exported for Ollama.

    Raises:
        LoraError: GGUF does not support the model, the tokenizer has no chat template, or Ollama's template language
            cannot express it.
    """
    gguf_format.check_supported(source, options)
    parts = infer_parts(source)
    check = check_template(source, parts, modelfile.parse_modelfile(make_modelfile(source, parts)))
    if not check.passed:
        raise LoraError(f"--to ollama: {check.found}", hint=chat_template.USE_GGUF_HINT)


def size(source: ExportSource, options: ExportOptions) -> int:
    """Return the bytes of the GGUF file, about."""
    return gguf_format.size(source, options)


def write(source: ExportSource, out: Path, options: ExportOptions) -> None:
    """Write the GGUF file and the Modelfile to the folder `out`.

    Raises:
        LoraError: a weight or text cannot be written in these formats.
    """
    out.mkdir(exist_ok=True)
    gguf_format.write(source, out / WEIGHTS_FILE, options)
    (out / MODELFILE_NAME).write_text(make_modelfile(source, infer_parts(source)), encoding="utf-8", newline="")


def verify(source: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """Yield the checks of the GGUF file, and of the Modelfile as Ollama parses it.

    Raises:
        LoraError: llama.cpp cannot load the GGUF file, or the Modelfile is not valid.
    """
    yield from gguf_format.verify(source, out / WEIGHTS_FILE, options)
    instructions = modelfile.parse_modelfile((out / MODELFILE_NAME).read_bytes().decode("utf-8"))
    parts = infer_parts(source)
    yield check_template(source, parts, instructions)
    yield check_stops(source, parts, instructions)


def usage(source: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """Return the commands that create and run the model in Ollama."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(source.name).name.lower()).strip("-._") or "model"
    return [f"ollama create {name} -f {shell_path(out / MODELFILE_NAME)}", f"ollama run {name}"]


def infer_parts(source: ExportSource) -> TemplateParts:
    """Return the texts that the tokenizer's chat template puts around contents.

    Raises:
        LoraError: the tokenizer has no chat template, or one whose texts cannot be inferred.
    """
    try:
        source.tokenizer.get_chat_template()
    except ValueError as reason:  # no template, or several templates without a default
        raise LoraError(
            "--to ollama: the tokenizer has no chat template, which Ollama needs",
            hint="use --to gguf, or train with a tokenizer that has one",
        ) from reason
    return chat_template.infer_template(source.tokenizer, runtime_bos=_bos_text(source))


def _bos_text(source: ExportSource) -> str:
    """Return the text of the BOS token that llama.cpp adds to every prompt, as the GGUF file requests; "" if none."""
    metadata = tokenizer.convert_tokenizer(
        source.tokenizer, source.config, generation_eos=reference.eos_ids(source)
    ).metadata
    if metadata["add_eos_token"]:
        raise LoraError(
            "--to ollama: the tokenizer adds EOS to the end of every text, so Ollama would add it to every prompt",
            hint="export with a tokenizer that does not (add_eos_token: false)",
        )
    return str(source.tokenizer.convert_ids_to_tokens(metadata["bos_token_id"])) if metadata["add_bos_token"] else ""


def make_modelfile(source: ExportSource, parts: TemplateParts) -> str:
    """Return the text of the Modelfile.

    Raises:
        LoraError: a Modelfile cannot express one of the texts.
    """
    lines = [f"FROM ./{WEIGHTS_FILE}\n", modelfile.format_instruction("TEMPLATE", make_go_template(parts))]
    if parts.system and parts.system.default:
        lines.append(modelfile.format_instruction("SYSTEM", parts.system.default))
    lines += [modelfile.format_instruction("PARAMETER stop", text) for text in stop_texts(source, parts)]
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if positions and positions <= MAX_CONTEXT:
        lines.append(f"PARAMETER num_ctx {positions}\n")
    return "".join(lines)


def make_go_template(parts: TemplateParts) -> str:
    """Return the Modelfile's TEMPLATE: the chat template in Go's language, over `.Messages`.

    Raises:
        LoraError: Go cannot express one of the texts.
    """
    escape, system = go_template.escape_text, parts.system
    # Where the text before the first user turn can begin that turn, the variable $open is true if it has.
    tracks_open = parts.opening_joins_user or (system is not None and system.joins_user)
    template = escape(parts.bos) + (_set_open(":=", parts.opening_joins_user) if tracks_open else "")
    opening, before_user = escape(parts.opening), escape(parts.before_user)
    if system is None or system.in_last_user:
        template += opening + "{{ range $i, $m := .Messages }}{{ if "
    else:
        rendered = escape(system.before) + "{{ .Content }}" + escape(system.after)
        rendered += _set_open("=", system.joins_user) if tracks_open else ""
        if system.skips_empty:
            rendered = "{{ if .Content }}" + rendered + "{{ else if eq $i 0 }}" + opening + "{{ end }}"
        template += "{{ range $i, $m := .Messages }}"
        template += '{{ if and (eq $i 0) (ne .Role "system") }}' + opening + "{{ end }}" if opening else ""
        template += '{{ if eq .Role "system" }}' + rendered + "{{ else if "
    template += 'eq .Role "user" }}'
    template += "{{ if not $open }}" + before_user + "{{ end }}" if tracks_open else before_user
    if system and system.in_last_user:
        first = "(index $.Messages 0)"
        conditions = [f'(eq {first}.Role "system")', *([f"{first}.Content"] if system.skips_empty else [])]
        template += "{{ if and (eq (len (slice $.Messages $i)) 1) " + " ".join(conditions) + " }}"
        template += "{{ " + first + ".Content }}" + escape(system.after) + "{{ end }}"
    template += "{{ .Content }}" + escape(parts.after_user)
    template += '{{ else if eq .Role "assistant" }}' + escape(parts.before_assistant) + "{{ .Content }}"
    # Only assistant turns reset $open: Ollama merges user messages, so no user turn directly follows another.
    template += escape(parts.after_assistant) + (_set_open("=", False) if tracks_open else "")
    return template + "{{ end }}{{ end }}" + escape(parts.generation_prompt)


def _set_open(operator: str, value: bool) -> str:
    return f"{{{{ $open {operator} {str(value).lower()} }}}}"


def stop_texts(source: ExportSource, parts: TemplateParts) -> list[str]:
    """Return the texts that end an answer: those of the EOS tokens, and the one that ends an assistant turn."""
    added = source.tokenizer.added_tokens_decoder
    ends = reference.eos_ids(source)
    texts = [added[end].content if end in added else str(source.tokenizer.decode([end])) for end in ends]
    return [text for text in dict.fromkeys([*texts, parts.stop]) if text]


def ollama_prompt(instructions: Sequence[Instruction], chat: Messages) -> str:
    """Return the prompt that Ollama renders from `chat` with a Modelfile's instructions, before it adds BOS.

    Raises:
        UnsupportedTemplate: the TEMPLATE has syntax that `go_template` does not support.
    """
    values = {instruction.name: instruction.value for instruction in instructions}
    messages = list(chat)
    if values.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": values["system"]})
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    return go_template.render_go_template(values["template"], {"Messages": merged})


def check_template(source: ExportSource, parts: TemplateParts, instructions: Sequence[Instruction]) -> Check:
    """Check that Ollama's prompts of the twenty probe chats have the same token ids as the tokenizer's own."""
    same, refused, trimmed, other, example = 0, 0, 0, 0, ""
    for number, chat in enumerate(probe_chats.PROBE_CHATS):
        text = probe_chats.render_prompt(source.tokenizer, chat)
        if text is None:
            refused += 1
            continue
        prompt, trimmed_prompt = (
            parts.runtime_bos + ollama_prompt(instructions, messages) for messages in (chat, parts.trimmed(chat))
        )
        expected = probe_chats.prompt_ids(source.tokenizer, text)
        if probe_chats.prompt_ids(source.tokenizer, prompt) == expected:
            same += 1
        elif probe_chats.prompt_ids(source.tokenizer, trimmed_prompt) == expected:
            trimmed += 1
        else:
            other += 1
            example = example or f"in chat {number}, {_difference(text, trimmed_prompt)}"
    result = f"{same} of {len(probe_chats.PROBE_CHATS)} chats have the same token ids"
    if trimmed:
        trims = ", ".join(f"{role}: {trim}" for role, trim in parts.trims.items() if trim != chat_template.NO_TRIM)
        result += f"; {trimmed} keep whitespace that the tokenizer's template trims ({trims})"
    result += f"; the tokenizer's template refuses {refused}" if refused else ""
    result += f"; {other} have other token ids: {example}" if other else ""
    result += "".join(f"; {note}" for note in _notes(source, parts, instructions))
    figures = {"same": same, "trimmed": trimmed, "refused": refused, "other": other}
    return Check("template", not other, result, figures)


def _difference(expected: str, prompt: str) -> str:
    """Describe the first difference of two prompts, with a few characters around it."""
    at = next((at for at, (a, b) in enumerate(zip(expected, prompt, strict=False)) if a != b), len(expected))
    before, after = (text[max(0, at - 15) : at + 15] for text in (expected, prompt))
    return f"{before!r} became {after!r}"


def _notes(source: ExportSource, parts: TemplateParts, instructions: Sequence[Instruction]) -> Iterator[str]:
    """Yield differences that the probe chats do not cover."""
    if parts.system is None:
        yield "system messages are left out: the tokenizer's template does not support them"
    for description, roles in UNUSUAL_ORDERS.items():
        chat = chat_template.marker_chat(roles)
        text = probe_chats.render_prompt(source.tokenizer, chat)
        if text is not None and text != parts.runtime_bos + ollama_prompt(instructions, chat):
            yield f"chats that {description} give different text"
    if "strftime_now" in source.tokenizer.get_chat_template():
        yield "the tokenizer's template writes the current date, the Modelfile always the date of the export"


def check_stops(source: ExportSource, parts: TemplateParts, instructions: Sequence[Instruction]) -> Check:
    """Check that the Modelfile, as Ollama parses it, has a stop parameter for every text that ends an answer."""
    stops = [instruction.value for instruction in instructions if instruction.name == "stop"]
    missing = [text for text in stop_texts(source, parts) if text not in stops]
    result = (
        f"no PARAMETER stop for {', '.join(map(repr, missing))}"
        if missing
        else f"generation stops at {', '.join(map(repr, stops))}"
    )
    return Check("stop texts", not missing and bool(stops), result, {"stops": len(stops), "lacking": len(missing)})
