"""`--to ollama`: a folder with a GGUF file and the Modelfile that `ollama create` takes.

Ollama does not run the tokenizer's own template: it has one in Go's language, which is made here of what the
tokenizer's does (see `turns`), and held against it chat by chat. Facts are from Ollama's template/template.go and
server/: it merges neighbours of one role, puts SYSTEM in front of chats that do not begin with a system message, drops
a chat's oldest messages but those of the system where it is longer than num_ctx, and adds BOS where the GGUF file says
so. Tools and reasoning are left out. Ollama itself was never run by this project: Go's language is, by an interpreter.
"""

import re
import shlex
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

WEIGHTS_FILE, MODELFILE_NAME = "model.gguf", "Modelfile"
# Ollama keeps room for all of num_ctx as soon as it loads a model, and chooses by the memory that is there if not told:
# 4,096 positions or more. A model that has a few more than that is given all of them, larger ones are left to Ollama.
MAX_CONTEXT = 8192
# Orders that chats seldom have: what becomes of them is told, where the tokenizer's template takes them at all.
UNUSUAL_ORDERS = {
    "begin with the assistant": "au",
    "end with the assistant": "ua",
    "have a later system message": "uasu",
}


def refuse(subject: ExportSource, options: ExportOptions) -> None:
    """What GGUF refuses, no chat template, and one that Ollama's language cannot express."""
    gguf_format.refuse(subject, options)
    found = infer(subject)
    check = check_template(subject, found, modelfile.parse_modelfile(make_modelfile(subject, found)))
    if not check.passed:
        raise LoraError(f"--to ollama: {check.found}", hint=chat_template.USE_GGUF_HINT)


def write(subject: ExportSource, out: Path, options: ExportOptions) -> None:
    """The folder `out`."""
    out.mkdir(exist_ok=True)
    gguf_format.write(subject, out / WEIGHTS_FILE, options)
    (out / MODELFILE_NAME).write_text(make_modelfile(subject, infer(subject)), encoding="utf-8", newline="")


def prove(subject: ExportSource, out: Path, options: ExportOptions) -> Iterator[Check]:
    """The GGUF file as such, and the Modelfile as Ollama reads it."""
    yield from gguf_format.prove(subject, out / WEIGHTS_FILE, options)
    told = modelfile.parse_modelfile((out / MODELFILE_NAME).read_bytes().decode("utf-8"))
    found = infer(subject)
    yield check_template(subject, found, told)
    yield check_stops(subject, found, told)


def usage(subject: ExportSource, out: Path, options: ExportOptions) -> list[str]:
    """How Ollama takes it up."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(subject.name).name.lower()).strip("-._") or "model"
    return [f"ollama create {name} -f {shlex.quote(str(out / MODELFILE_NAME))}", f"ollama run {name}"]


def infer(subject: ExportSource) -> TemplateParts:
    """What there is to be expressed.

    Raises:
        LoraError: there is no chat template, or one that cannot be.
    """
    try:
        subject.tokenizer.get_chat_template()
    except ValueError as reason:  # there is none, or several and none of them the default
        raise LoraError(
            "--to ollama: the tokenizer has no chat template, and Ollama completes chats",
            hint="use --to gguf, or train with a tokenizer that has one",
        ) from reason
    return chat_template.infer_template(subject.tokenizer, added=_bos(subject))


def _bos(subject: ExportSource) -> str:
    """The text of the token that llama.cpp, told by the GGUF file, puts in front of every prompt; "" for none."""
    words = tokenizer.convert_tokenizer(
        subject.tokenizer, subject.config, generation_eos=reference.eos_ids(subject)
    ).metadata
    if words["add_eos_token"]:
        raise LoraError(
            "--to ollama: the tokenizer ends every text with EOS, and so would Ollama end every prompt",
            hint="export with a tokenizer that does not (add_eos_token: false)",
        )
    return str(subject.tokenizer.convert_ids_to_tokens(words["bos_token_id"])) if words["add_bos_token"] else ""


def make_modelfile(subject: ExportSource, found: TemplateParts) -> str:
    """The text of the Modelfile.

    Raises:
        LoraError: a text of it cannot be held by one.
    """
    lines = [f"FROM ./{WEIGHTS_FILE}\n", modelfile.format_instruction("TEMPLATE", go_template_of(found))]
    if found.system and found.system.default:
        lines.append(modelfile.format_instruction("SYSTEM", found.system.default))
    lines += [modelfile.format_instruction("PARAMETER stop", text) for text in stop_texts(subject, found)]
    positions = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if positions and positions <= MAX_CONTEXT:
        lines.append(f"PARAMETER num_ctx {positions}\n")
    return "".join(lines)


def go_template_of(found: TemplateParts) -> str:
    """The TEMPLATE: `found` in Go's language, over the messages."""
    text, system = go_template.escape_text, found.system
    # Where a user turn may have begun with what is before it, a variable tells.
    flagged = found.opens or (system is not None and system.joins)
    made = text(found.start) + (_flag(":=", found.opens) if flagged else "")
    opening, before_user = text(found.opening), text(found.before_user)
    if system is None or system.late:
        made += opening + "{{ range $i, $m := .Messages }}{{ if "
    else:
        shown = text(system.before) + "{{ .Content }}" + text(system.after)
        shown += _flag("=", system.joins) if flagged else ""
        if system.hides:
            shown = "{{ if .Content }}" + shown + "{{ else if eq $i 0 }}" + opening + "{{ end }}"
        made += "{{ range $i, $m := .Messages }}"
        made += '{{ if and (eq $i 0) (ne .Role "system") }}' + opening + "{{ end }}" if opening else ""
        made += '{{ if eq .Role "system" }}' + shown + "{{ else if "
    made += 'eq .Role "user" }}'
    made += "{{ if not $open }}" + before_user + "{{ end }}" if flagged else before_user
    if system and system.late:
        first = "(index $.Messages 0)"
        given = [f'(eq {first}.Role "system")', *([f"{first}.Content"] if system.hides else [])]
        made += "{{ if and (eq (len (slice $.Messages $i)) 1) " + " ".join(given) + " }}"
        made += "{{ " + first + ".Content }}" + text(system.after) + "{{ end }}"
    made += "{{ .Content }}" + text(found.after_user)
    made += '{{ else if eq .Role "assistant" }}' + text(found.before_assistant) + "{{ .Content }}"
    made += text(found.after_assistant) + (_flag("=", False) if flagged else "")  # user turns never are neighbours
    return made + "{{ end }}{{ end }}" + text(found.generation)


def _flag(sign: str, value: bool) -> str:
    return f"{{{{ $open {sign} {str(value).lower()} }}}}"


def stop_texts(subject: ExportSource, found: TemplateParts) -> list[str]:
    """The texts at which an answer ends: those of the tokens that are said to, and what ends one in a chat."""
    added = subject.tokenizer.added_tokens_decoder
    ends = reference.eos_ids(subject)
    texts = [added[end].content if end in added else str(subject.tokenizer.decode([end])) for end in ends]
    return [text for text in dict.fromkeys([*texts, found.stop]) if text]


def ollama_prompt(told: Sequence[Instruction], chat: Messages) -> str:
    """The prompt that Ollama makes of `chat` with a Modelfile's instructions, before it adds BOS."""
    given = {command.name: command.value for command in told}
    messages = list(chat)
    if given.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": given["system"]})
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    return go_template.render_go_template(given["template"], {"Messages": merged})


def check_template(subject: ExportSource, found: TemplateParts, told: Sequence[Instruction]) -> Check:
    """The twenty chats: the tokens that Ollama makes of them, against the tokenizer's own."""
    same, refused, trimmed, other, wrong = 0, 0, 0, 0, ""
    for number, chat in enumerate(probe_chats.PROBE_CHATS):
        text = probe_chats.render_prompt(subject.tokenizer, chat)
        if text is None:
            refused += 1
            continue
        plain, bare = (found.added + ollama_prompt(told, messages) for messages in (chat, found.trimmed(chat)))
        expected = probe_chats.prompt_ids(subject.tokenizer, text)
        if probe_chats.prompt_ids(subject.tokenizer, plain) == expected:
            same += 1
        elif probe_chats.prompt_ids(subject.tokenizer, bare) == expected:
            trimmed += 1
        else:
            other += 1
            wrong = wrong or f"in chat {number} {_difference(text, bare)}"
    said = f"{same} of {len(probe_chats.PROBE_CHATS)} chats become the same tokens"
    if trimmed:
        taken = ", ".join(f"{role}: {what}" for role, what in found.trims.items() if what != chat_template.NO_TRIM)
        said += f"; {trimmed} keep what the tokenizer's template takes off contents ({taken})"
    said += f"; {refused} the tokenizer's template refuses" if refused else ""
    said += f"; {other} become others: {wrong}" if other else ""
    said += "".join(f"; {note}" for note in _notes(subject, found, told))
    figures = {"same": same, "trimmed": trimmed, "refused": refused, "other": other}
    return Check("template", not other, said, figures)


def _difference(theirs: str, ours: str) -> str:
    """Where two prompts part, in a few words."""
    at = next((at for at, (one, two) in enumerate(zip(theirs, ours, strict=False)) if one != two), len(theirs))
    one, two = (text[max(0, at - 15) : at + 15] for text in (theirs, ours))
    return f"{one!r} became {two!r}"


def _notes(subject: ExportSource, found: TemplateParts, told: Sequence[Instruction]) -> Iterator[str]:
    """What differs where the chats do not go."""
    if found.system is None:
        yield "system messages are left out: the tokenizer's template takes none"
    for what, roles in UNUSUAL_ORDERS.items():
        chat = chat_template.marker_chat(roles)
        text = probe_chats.render_prompt(subject.tokenizer, chat)
        if text is not None and text != found.added + ollama_prompt(told, chat):
            yield f"chats that {what} become other text"
    if "strftime_now" in subject.tokenizer.get_chat_template():
        yield "the tokenizer's template writes the day's date, the Modelfile has that of the export"


def check_stops(subject: ExportSource, found: TemplateParts, told: Sequence[Instruction]) -> Check:
    """Every text that ends an answer, as Ollama reads it."""
    expected = stop_texts(subject, found)
    written = [command.value for command in told if command.name == "stop"]
    lacking = [text for text in expected if text not in written]
    said = (
        f"no PARAMETER stop for {', '.join(map(repr, lacking))}" if lacking else f"at {', '.join(map(repr, written))}"
    )
    return Check("stop texts", not lacking and bool(written), said, {"stops": len(written), "lacking": len(lacking)})
