"""The text that torchtune's tokenizers write around messages, and Alpaca's within a user's turn. No torch."""

import re
from typing import NamedTuple

from lora_cli.convert.draft import Draft

COMPONENT = "_component_"
PLAIN = "plain"  # tokenizers that write nothing around messages
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


class Turns(NamedTuple):
    """What a tokenizer writes around each message; the templates of the bases write system messages of their own."""

    before: str  # with {} for the role
    after: str
    named: str | None  # template of this tool that writes the same
    trimmed: bool = False  # whether spaces around a message are left out


TURNS = {
    "llama3": Turns("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "llama3", trimmed=True),
    "qwen2": Turns("<|im_start|>{}\n", "<|im_end|>\n", "chatml"),
    "phi3": Turns("<|{}|>\n", "<|end|>\n", None),  # as Phi's own template
}


def tokenizer_family(draft: Draft) -> str:
    """Return the key of TURNS for the tokenizer of a config, PLAIN, or nothing if its text is not known."""
    if draft.config.text("tokenizer.prompt_template"):
        return ""
    named = draft.config.get(f"tokenizer.{COMPONENT}") or draft.config.get(f"model.{COMPONENT}")
    found = re.search(r"\.(llama3|qwen2|phi3)", str(named))
    return found[1] if found else PLAIN if plain_family(draft) else ""


def plain_family(draft: Draft) -> str | None:
    """Return the family of a model whose tokenizer writes nothing around messages; None for others."""
    found = re.search(r"\.((?:code_)?llama2|gemma2?|mistral)\.", str(draft.config.get(f"model.{COMPONENT}")))
    return found[1] if found and not draft.config.text("tokenizer.prompt_template") else None


def carry_text(draft: Draft, builders: dict[str, str]) -> None:
    """Carry the text around messages as a chat template.

    Args:
        draft: of the recipe.
        builders: names of the dataset builders whose rows are messages, by the key of their section.
    """
    family = tokenizer_family(draft)
    turns = TURNS.get(family)
    alpaca = [prefix for prefix, name in builders.items() if name.startswith("alpaca")]
    written = bool(alpaca and family and len(alpaca) == len(builders))
    for prefix in [] if written else alpaca:
        why = "one template is for all sources" if family else "the text of this tokenizer is not known here"
        reason = f"writes Alpaca's text into the user's turn, and {why}; accepted: the instruction alone"
        draft.refuse(f"{prefix}.{COMPONENT}", reason)
    if written and turns:
        draft.put("data.chat_template", _template(turns), "Alpaca's text in the turns of the tokenizer")
    elif written:
        around = (
            "" if str(plain_family(draft)).startswith("gemma") else "; from version 0.3 on, [INST] is around prompts"
        )
        draft.assume("data.chat_template", "alpaca", f"these tokenizers add no template to Alpaca's text{around}")
    elif builders and turns and turns.named:
        draft.assume("data.chat_template", turns.named, f"what the tokenizer of {family} writes around messages")


def _template(turns: Turns) -> str:
    """Return the chat template of turns whose user's turn has Alpaca's text."""
    before, rest = turns.before.split("{}")
    start, end = ALPACA.split("{}")
    trim = " | trim" if turns.trimmed else ""
    return (
        f"{{% for message in messages %}}{{{{ {before!r} + message['role'] + {rest!r} }}}}"
        f"{{% if message['role'] == 'user' %}}{{{{ ({start!r} + message['content'] + {end!r}){trim} }}}}"
        f"{{% else %}}{{{{ message['content']{trim} }}}}{{% endif %}}{{{{ {turns.after!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {before + 'assistant' + rest!r} }}}}{{% endif %}}"
    )
