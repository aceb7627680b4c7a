"""Chat templates of other tools, by name: one of this tool's, the tokenizer's own, or none; and prompts. No torch."""

import re

from lora_cli.convert.draft import Draft
from lora_cli.data.named_templates import NAMED_TEMPLATES

OWN = "the tokenizer's own template is used"
# Names of templates that are one of ours under another name.
SAME_TEMPLATES = {
    "chat_ml": "chatml",
    "mistral_v1": "mistral",
    "inst": "mistral",
    "llama-3": "llama3",
    "gemma-it": "gemma",
    "gemma_chatml": "chatml",
}
JINJA_FILES = (".jinja", ".jinja2", ".j2")
DEFAULT_TEMPLATES = ("tokenizer_default", "default", "auto", "tokenizer", "none", "")


def carry_template(draft: Draft, key: str, *, model: str | None) -> None:
    """Carry a chat template that the other tool has under a name.

    A name of the model's own family stands for the tokenizer's own template. Jinja text and files are carried.
    """
    value = draft.config.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        draft.refuse(key, f"is not a name, a path or a Jinja text; accepted: {OWN}")
        return
    name = value.strip().lower().removeprefix("tokenizer_default_fallback_")
    ours = SAME_TEMPLATES.get(name, name)
    if "{%" in value or "{{" in value or value.endswith(JINJA_FILES):
        draft.carry(key, "data.chat_template", value)
    elif name in DEFAULT_TEMPLATES:
        draft.same(key, OWN)
    elif value.startswith("tokenizer_default_fallback_"):
        draft.same(key, f"{OWN}; if it has none, write data.chat_template")
    elif ours in NAMED_TEMPLATES:
        draft.carry(key, "data.chat_template", ours)
    elif is_of_family(name, model):
        draft.same(key, f"{OWN}: {draft.tool}'s {value} is made after it, and may differ in details")
    else:
        draft.refuse(
            key, f"there is no chat template with this name here; accepted: {OWN}, or write data.chat_template"
        )


def is_of_family(template: str, model: str | None) -> bool:
    """Return whether a template has the name of the model's family: qwen3_nothink and Qwen/Qwen3-4B-Instruct."""
    words = re.match(r"[a-z]+", re.sub(r"[^a-z0-9]", "", template.lower()))
    name = re.sub(r"[^a-z0-9]", "", (model or "").lower())
    return words is not None and len(words[0]) > 2 and words[0] in name


def prompt_template(system: str, user: str, answer: str, *, preamble: str = "", after: str = "") -> str:
    """Return a chat template that writes a prompt and its answer as plain text.

    Args:
        system, user: text of such a message, with {} for what it says; an empty text leaves it out.
        answer: the text before an answer.
        preamble: of a system message that each conversation without one starts with.
        after: the text after an answer, before the end of the text.
    """

    def message(text: str) -> str:
        before, field, rest = text.partition("{}")
        return f"{{{{ {before!r} + message['content'] + {rest!r} }}}}" if field else ""

    start = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system.format(preamble)!r} }}}}{{% endif %}}"
    end = f"{after!r} + eos_token" if after else "eos_token"
    return (
        f"{start if preamble else ''}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{message(system)}"
        f"{{% elif message['role'] == 'user' %}}{message(user)}"
        f"{{% else %}}{{{{ {answer!r} + message['content'] + {end} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer!r} }}}}{{% endif %}}"
    )
