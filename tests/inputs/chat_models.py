"""Chat templates of the most used chat models, written from their descriptions, with the flags of their tokens.

`text` of each model is what its template renders, with [[ ]] around what carries loss: for one turn, for a system
message with one turn, and for two turns. The contents are those of `CHATS`.
"""

import json
from functools import cache
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast

from tests.inputs import tiny_tokenizers as tiny

CHATS = {
    "one": [("user", "Hello"), ("assistant", "Hi there")],
    "system": [("system", "Be brief"), ("user", "Hello"), ("assistant", "Hi there")],
    "two": [("user", "Hello"), ("assistant", "Hi there"), ("user", "And?"), ("assistant", "The answer")],
}


class ChatModel(NamedTuple):
    """A chat model's template and tokens."""

    template: str
    tokens: dict[str, str]  # added tokens with their flags: l (lstrip), r (rstrip), n (normalized), t (not special)
    eos: str
    one: str
    system: str | None  # None: the template rejects or omits system messages
    two: str
    bos: str | None = None
    sentencepiece: bool = False

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Build a tokenizer with a small vocabulary, and the tokens and flags of the model."""
        core = Tokenizer.from_str(_sentencepiece() if self.sentencepiece else _byte_level())
        for text, flags in self.tokens.items():
            token = AddedToken(
                text, special="t" not in flags, normalized="n" in flags, lstrip="l" in flags, rstrip="r" in flags
            )
            (core.add_tokens if "t" in flags else core.add_special_tokens)([token])
        assert all(core.token_to_id(token) is not None for token in (self.eos, self.bos) if token), self
        return PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token=self.eos, bos_token=self.bos, chat_template=self.template
        )


@cache
def _byte_level() -> str:
    return str(tiny.build(eos="<|unused|>").backend_tokenizer.to_str())


@cache
def _sentencepiece() -> str:
    """Return a tokenizer in the form of Llama 2 and Phi-3: a space before every text, without pre-tokenizer."""
    plain = json.loads(tiny.build_sentencepiece("").backend_tokenizer.to_str())
    plain |= {"pre_tokenizer": None, "post_processor": None, "added_tokens": plain["added_tokens"][:1]}
    core = Tokenizer.from_str(json.dumps(plain))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return str(core.to_str())


def turns(user: str, assistant: str, system: str = "", *, before: str = "", prompt: str, after: str = "") -> str:
    """Return a template of turns; `{}` in each text is the trimmed content."""

    def write(text: str) -> str:
        start, _, end = text.partition("{}")
        return f"{{{{ {start!r} }}}}{{{{ message['content'] | trim }}}}{{{{ {end!r} }}}}".replace("'$eos'", "eos_token")

    rest = write(system) if system else "{{ raise_exception('System role not supported') }}"
    return (
        f"{before}{{% for message in messages %}}{{% if message['role'] == 'user' %}}{write(user)}"
        f"{{% elif message['role'] == 'assistant' %}}{write(assistant)}{{% else %}}{rest}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}"
        f"{{% else %}}{after}{{% endif %}}"
    )


def chatml(before: str = "") -> str:
    """Return the template of ChatML with `before` at its start."""
    return turns(
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n",
        "<|im_start|>system\n{}<|im_end|>\n",
        before=before,
        prompt="<|im_start|>assistant\n",
    )


def default_system(text: str) -> str:
    """Return Jinja that writes `text` if the conversation has no system message."""
    return "{% if messages[0]['role'] != 'system' %}{{ " + repr(text) + " }}{% endif %}"


def llama3(before: str, system: str) -> str:
    """Return the template of Llama 3.1 and 3.2, whose system turn contains the date."""
    return (
        "{{ bos_token }}{% if not date_string is defined %}"
        "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        + before
        + "{{ 'Cutting Knowledge Date: December 2023\n' }}{{ 'Today Date: ' + date_string + '\n\n' }}"
        + system
        + "{{ system + '<|eot_id|>' }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )


# Reasoning of answers after the last question, an empty block where the last one has none; with enable_thinking false,
# the generation prompt writes the empty block.
QWEN3 = """{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' and message.content is string %}
        {%- set ns.searching = false %}{%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}{%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}PROMPT
{%- endif %}"""
QWEN3_SWITCH = """{%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}"""
QWEN3_THINKING = QWEN3.replace("PROMPT", "{{- '<think>\\n' }}")
QWEN3 = QWEN3.replace("PROMPT", QWEN3_SWITCH)

QWQ = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if not loop.last %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

DEEPSEEK = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>PROMPT' }}{% endif %}"
)
# DeepSeek V3.1: the variable `thinking` opens the block of reasoning in the generation prompt, else it is closed.
DEEPSEEK_SWITCH = (
    DEEPSEEK.replace("'<｜Assistant｜>' + content", "'<｜Assistant｜></think>' + content")
    .replace("{{ '<｜Assistant｜>PROMPT' }}", "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}")
    .replace("{{ bos_token }}", "{{ bos_token }}{% if not thinking is defined %}{% set thinking = false %}{% endif %}")
)

GPT_OSS = """{%- if not reasoning_effort is defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
{{- '<|start|>system<|message|>You are ChatGPT.\\nCurrent date: ' + strftime_now('%Y-%m-%d') }}
{{- '\\n\\nReasoning: ' + reasoning_effort + '<|end|>' }}
{%- for message in messages %}
    {%- if message.role in ('system', 'developer') %}
        {{- '<|start|>developer<|message|># Instructions\\n\\n' + message.content + '<|end|>' }}
    {%- elif message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'assistant' and loop.last and not add_generation_prompt %}
        {%- if 'thinking' in message %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# SmolLM3: its generation blocks contain the header and the empty block.
SMOLLM3 = """{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}
{{- '<|im_start|>system\\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') }}
{%- if messages[0].role == 'system' %}{{- '\\n\\n' + messages[0].content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {%- if enable_thinking %}
            {{- '<|im_start|>assistant\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL_SYSTEM = (  # the system message is written before the last question only
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ first if loop.first else '' }}{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
IM = {"<|im_start|>": "", "<|im_end|>": "", "<|endoftext|>": ""}
THINK = {"<think>": "t", "</think>": "t"}
HEADERS = {"<|begin_of_text|>": "", "<|end_of_text|>": "", "<|start_header_id|>": "", "<|end_header_id|>": ""}
U, A = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
S = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 05 Jan 2026\n\n"
IM_ONE = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[[Hi there<|im_end|>]]\n"
IM_NEXT = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[[The answer<|im_end|>]]\n"
IM_SYSTEM = "<|im_start|>system\nBe brief<|im_end|>\n"
QWEN_DEFAULT = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
SMOL_DEFAULT = "<|im_start|>system\nYou are SmolLM<|im_end|>\n"
GEMMA_ONE = "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n[[Hi there<end_of_turn>]]\n"
GEMMA_NEXT = "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n[[The answer<end_of_turn>]]\n"
GEMMA_TOKENS = {"<bos>": "", "<eos>": "", "<start_of_turn>": "", "<end_of_turn>": ""}
PHI_TOKENS = {"<s>": "", "</s>": "r", "<|endoftext|>": ""} | dict.fromkeys(
    ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"), "r"
)
PHI_ONE = "<|user|>\nHello<|end|>\n<|assistant|>\n[[Hi there<|end|>]]\n"
PHI_NEXT = "<|user|>\nAnd?<|end|>\n<|assistant|>\n[[The answer<|end|>]]\n"
PHI3 = turns(
    "<|user|>\n{}<|end|>\n",
    "<|assistant|>\n{}<|end|>\n",
    "<|system|>\n{}<|end|>\n",
    prompt="<|assistant|>\n",
    after="{{ eos_token }}",
)
ZEPHYR = turns("<|user|>\n{}</s>\n", "<|assistant|>\n{}</s>\n", "<|system|>\n{}</s>\n", prompt="<|assistant|>\n")
ZEPHYR_ONE = "<|user|>\nHello</s>\n<|assistant|>\n[[Hi there</s>]]\n"
ZEPHYR_NEXT = "<|user|>\nAnd?</s>\n<|assistant|>\n[[The answer</s>]]\n"
SP = {"<s>": "", "</s>": ""}
INST = {**SP, "[INST]": "", "[/INST]": "", "[SYSTEM_PROMPT]": "", "[/SYSTEM_PROMPT]": ""}
DS = {"<｜begin▁of▁sentence｜>": "", "<｜end▁of▁sentence｜>": "", "<｜User｜>": "t", "<｜Assistant｜>": "t", **THINK}
DS_BOS, DS_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DS_ONE = f"<｜User｜>Hello<｜Assistant｜>[[Hi there{DS_EOS}]]"
DS_NEXT = f"<｜User｜>And?<｜Assistant｜>[[The answer{DS_EOS}]]"
OSS = "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2026-01-05\n\nReasoning: medium<|end|>"
OSS_USER = "<|start|>user<|message|>{}<|end|><|start|>assistant[[<|channel|>final<|message|>{}"
CR = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>{}<|END_OF_TURN_TOKEN|>"
OPEN_USER, OPEN_BOT = "GPT4 Correct User: {}<|end_of_turn|>", "GPT4 Correct Assistant: {}<|end_of_turn|>"

MODELS: dict[str, ChatModel] = {
    "llama2": ChatModel(
        LLAMA2, SP, "</s>",
        "<s>[INST] Hello [/INST][[ Hi there </s>]]",
        "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHello [/INST][[ Hi there </s>]]",
        "<s>[INST] Hello [/INST][[ Hi there </s>]]<s>[INST] And? [/INST][[ The answer </s>]]",
        bos="<s>", sentencepiece=True,
    ),
    "llama3": ChatModel(
        tiny.LLAMA3, HEADERS | {"<|eot_id|>": ""}, "<|eot_id|>",
        f"<|begin_of_text|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]",
        f"{S}Be brief<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]",
        f"<|begin_of_text|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]{U}And?<|eot_id|>{A}[[The answer<|eot_id|>]]",
        bos="<|begin_of_text|>",
    ),
    "llama3.1": ChatModel(
        llama3("", ""), HEADERS | {"<|eot_id|>": "", "<|eom_id|>": ""}, "<|eot_id|>",
        f"{S}{DATE}<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]",
        f"{S}{DATE}Be brief<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]",
        f"{S}{DATE}<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]{U}And?<|eot_id|>{A}[[The answer<|eot_id|>]]",
        bos="<|begin_of_text|>",
    ),
    "llama4": ChatModel(
        turns("<|header_start|>user<|header_end|>\n\n{}<|eot|>", "<|header_start|>assistant<|header_end|>\n\n{}<|eot|>",
              "<|header_start|>system<|header_end|>\n\n{}<|eot|>", before="{{ bos_token }}",
              prompt="<|header_start|>assistant<|header_end|>\n\n"),
        {"<|begin_of_text|>": "", "<|header_start|>": "", "<|header_end|>": "", "<|eot|>": ""}, "<|eot|>",
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n[[Hi there<|eot|>]]",
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHello<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n[[Hi there<|eot|>]]",
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n[[Hi there<|eot|>]]"
        "<|header_start|>user<|header_end|>\n\nAnd?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n[[The answer<|eot|>]]",
        bos="<|begin_of_text|>",
    ),
    "mistral v1, mixtral": ChatModel(
        turns(" [INST] {} [/INST]", " {}$eos", before="{{ bos_token }}", prompt="").replace("$eos", "</s>"), SP, "</s>",
        "<s> [INST] Hello [/INST][[ Hi there</s>]]", None,
        "<s> [INST] Hello [/INST][[ Hi there</s>]] [INST] And? [/INST][[ The answer</s>]]",
        bos="<s>", sentencepiece=True,
    ),
    "mistral v3": ChatModel(
        MISTRAL_SYSTEM, INST, "</s>", "<s>[INST] Hello[/INST][[ Hi there</s>]]", None,
        "<s>[INST] Hello[/INST][[ Hi there</s>]][INST] And?[/INST][[ The answer</s>]]", bos="<s>", sentencepiece=True,
    ),
    "mistral nemo": ChatModel(
        MISTRAL_SYSTEM.replace("'[INST] '", "'[INST]'").replace("' ' + ", ""), INST, "</s>",
        "<s>[INST]Hello[/INST][[Hi there</s>]]", None,
        "<s>[INST]Hello[/INST][[Hi there</s>]][INST]And?[/INST][[The answer</s>]]", bos="<s>",
    ),
    "mistral small 3": ChatModel(
        turns("[INST]{}[/INST]", "{}</s>", "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", prompt="", before="{{ bos_token }}"
              "{% if messages[0]['role'] != 'system' %}"
              "{{ '[SYSTEM_PROMPT]Today is ' + strftime_now('%Y-%m-%d') + '[/SYSTEM_PROMPT]' }}{% endif %}"),
        INST, "</s>", "<s>[SYSTEM_PROMPT]Today is 2026-01-05[/SYSTEM_PROMPT][INST]Hello[/INST][[Hi there</s>]]",
        "<s>[SYSTEM_PROMPT]Be brief[/SYSTEM_PROMPT][INST]Hello[/INST][[Hi there</s>]]",
        "<s>[SYSTEM_PROMPT]Today is 2026-01-05[/SYSTEM_PROMPT][INST]Hello[/INST][[Hi there</s>]]"
        "[INST]And?[/INST][[The answer</s>]]", bos="<s>",
    ),
    "qwen2, qwen2.5": ChatModel(
        chatml(default_system(QWEN_DEFAULT)), IM, "<|im_end|>",
        QWEN_DEFAULT + IM_ONE, IM_SYSTEM + IM_ONE, QWEN_DEFAULT + IM_ONE + IM_NEXT,
    ),
    # A server with enable_thinking false writes the empty block of the last answer, so that it carries no loss.
    "qwen3": ChatModel(
        QWEN3, IM | THINK, "<|im_end|>",
        IM_ONE.replace("[[", "<think>\n\n</think>\n\n[["),
        IM_SYSTEM + IM_ONE.replace("[[", "<think>\n\n</think>\n\n[["),
        IM_ONE + IM_NEXT.replace("[[", "<think>\n\n</think>\n\n[["),
    ),
    # The generation prompt ends after `<think>\n`: the model itself ends an empty block.
    "qwen3 thinking": ChatModel(
        QWEN3_THINKING, IM | THINK, "<|im_end|>",
        IM_ONE.replace("[[", "<think>\n[[\n</think>\n\n"),
        IM_SYSTEM + IM_ONE.replace("[[", "<think>\n[[\n</think>\n\n"),
        IM_ONE + IM_NEXT.replace("[[", "<think>\n[[\n</think>\n\n"),
    ),
    "qwq": ChatModel(QWQ, IM | THINK, "<|im_end|>", IM_ONE, IM_SYSTEM + IM_ONE, IM_ONE + IM_NEXT),
    "gemma, gemma2": ChatModel(
        tiny.GEMMA, GEMMA_TOKENS, "<eos>", "<bos>" + GEMMA_ONE, None, "<bos>" + GEMMA_ONE + GEMMA_NEXT, bos="<bos>",
    ),
    "gemma3": ChatModel(
        GEMMA3, GEMMA_TOKENS, "<eos>", "<bos>" + GEMMA_ONE, "<bos>" + GEMMA_ONE.replace("Hello", "Be brief\n\nHello"),
        "<bos>" + GEMMA_ONE + GEMMA_NEXT, bos="<bos>",
    ),
    "phi3": ChatModel(
        PHI3, PHI_TOKENS, "<|endoftext|>", PHI_ONE + "<|endoftext|>",
        "<|system|>\nBe brief<|end|>\n" + PHI_ONE + "<|endoftext|>", PHI_ONE + PHI_NEXT + "<|endoftext|>",
        bos="<s>", sentencepiece=True,
    ),
    "phi4": ChatModel(
        turns("<|im_start|>user<|im_sep|>{}<|im_end|>", "<|im_start|>assistant<|im_sep|>{}<|im_end|>",
              "<|im_start|>system<|im_sep|>{}<|im_end|>", prompt="<|im_start|>assistant<|im_sep|>"),
        dict.fromkeys((*IM, "<|im_sep|>"), "lr"), "<|im_end|>",
        "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>[[Hi there<|im_end|>]]",
        "<|im_start|>system<|im_sep|>Be brief<|im_end|>"
        "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>[[Hi there<|im_end|>]]",
        "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>[[Hi there<|im_end|>]]"
        "<|im_start|>user<|im_sep|>And?<|im_end|><|im_start|>assistant<|im_sep|>[[The answer<|im_end|>]]",
    ),
    "phi4 mini": ChatModel(
        PHI3.replace("\\n", ""), dict.fromkeys(("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"), "r")
        | {"<|endoftext|>": ""}, "<|endoftext|>",
        PHI_ONE.replace("\n", "") + "<|endoftext|>",
        "<|system|>Be brief<|end|>" + PHI_ONE.replace("\n", "") + "<|endoftext|>",
        (PHI_ONE + PHI_NEXT).replace("\n", "") + "<|endoftext|>",
    ),
    "deepseek v2": ChatModel(
        turns("User: {}\n\n", "Assistant: {}" + DS_EOS, "{}\n\n", before="{{ bos_token }}", prompt="Assistant:"),
        {DS_BOS: "", DS_EOS: ""}, DS_EOS, f"{DS_BOS}User: Hello\n\nAssistant:[[ Hi there{DS_EOS}]]",
        f"{DS_BOS}Be brief\n\nUser: Hello\n\nAssistant:[[ Hi there{DS_EOS}]]",
        f"{DS_BOS}User: Hello\n\nAssistant:[[ Hi there{DS_EOS}]]User: And?\n\nAssistant:[[ The answer{DS_EOS}]]",
        bos=DS_BOS,
    ),
    "deepseek v3": ChatModel(
        DEEPSEEK.replace("PROMPT", ""), DS, DS_EOS, DS_BOS + DS_ONE, f"{DS_BOS}Be brief{DS_ONE}",
        DS_BOS + DS_ONE + DS_NEXT, bos=DS_BOS,
    ),
    "deepseek v3.1": ChatModel(
        DEEPSEEK_SWITCH, DS, DS_EOS, DS_BOS + DS_ONE.replace("[[", "</think>[["),
        f"{DS_BOS}Be brief" + DS_ONE.replace("[[", "</think>[["),
        DS_BOS + (DS_ONE + DS_NEXT).replace("[[", "</think>[["), bos=DS_BOS,
    ),
    "deepseek r1 and distilled": ChatModel(
        DEEPSEEK.replace("PROMPT", "<think>\\n"), DS, DS_EOS, DS_BOS + DS_ONE, f"{DS_BOS}Be brief{DS_ONE}",
        DS_BOS + DS_ONE + DS_NEXT, bos=DS_BOS,
    ),
    "gpt-oss": ChatModel(
        GPT_OSS, dict.fromkeys(("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), ""),
        "<|return|>", OSS + OSS_USER.format("Hello", "Hi there<|return|>]]"),
        OSS + "<|start|>developer<|message|># Instructions\n\nBe brief<|end|>"
        + OSS_USER.format("Hello", "Hi there<|return|>]]"),
        OSS + OSS_USER.format("Hello", "Hi there<|end|>]]") + OSS_USER.format("And?", "The answer<|return|>]]"),
    ),
    "smollm2": ChatModel(
        chatml(default_system(SMOL_DEFAULT)), IM, "<|im_end|>",
        SMOL_DEFAULT + IM_ONE, IM_SYSTEM + IM_ONE, SMOL_DEFAULT + IM_ONE + IM_NEXT,
    ),
    "smollm3": ChatModel(
        SMOLLM3, IM | THINK, "<|im_end|>", "<|im_start|>system\nReasoning Mode: /think<|im_end|>\n" + IM_ONE,
        "<|im_start|>system\nReasoning Mode: /think\n\nBe brief<|im_end|>\n" + IM_ONE,
        "<|im_start|>system\nReasoning Mode: /think<|im_end|>\n" + IM_ONE + IM_NEXT,
    ),
    "zephyr": ChatModel(
        ZEPHYR, SP, "</s>", ZEPHYR_ONE, "<|system|>\nBe brief</s>\n" + ZEPHYR_ONE, ZEPHYR_ONE + ZEPHYR_NEXT,
        bos="<s>", sentencepiece=True,
    ),
    "tinyllama": ChatModel(
        ZEPHYR, SP | {"<unk>": ""}, "</s>", ZEPHYR_ONE, "<|system|>\nBe brief</s>\n" + ZEPHYR_ONE,
        ZEPHYR_ONE + ZEPHYR_NEXT, bos="<s>", sentencepiece=True,
    ),
    "falcon3": ChatModel(
        turns("<|user|>\n{}\n", "<|assistant|>\n{}<|endoftext|>\n", "<|system|>\n{}\n", prompt="<|assistant|>\n"),
        dict.fromkeys(("<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"), ""), "<|endoftext|>",
        "<|user|>\nHello\n<|assistant|>\n[[Hi there<|endoftext|>]]\n",
        "<|system|>\nBe brief\n<|user|>\nHello\n<|assistant|>\n[[Hi there<|endoftext|>]]\n",
        "<|user|>\nHello\n<|assistant|>\n[[Hi there<|endoftext|>]]\n"
        "<|user|>\nAnd?\n<|assistant|>\n[[The answer<|endoftext|>]]\n",
    ),
    "olmo2": ChatModel(
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        {"<|endoftext|>": ""}, "<|endoftext|>",
        "<|endoftext|><|user|>\nHello\n<|assistant|>\n[[Hi there<|endoftext|>]]",
        "<|endoftext|><|system|>\nBe brief\n<|user|>\nHello\n<|assistant|>\n[[Hi there<|endoftext|>]]",
        "<|endoftext|><|user|>\nHello\n<|assistant|>\n[[Hi there<|endoftext|>]]\n"
        "<|user|>\nAnd?\n<|assistant|>\n[[The answer<|endoftext|>]]", bos="<|endoftext|>",
    ),
    "granite3": ChatModel(
        turns("<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n",
              "<|start_of_role|>assistant<|end_of_role|>{}<|end_of_text|>\n",
              "<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n",
              prompt="<|start_of_role|>assistant<|end_of_role|>", before="{% if messages[0]['role'] != 'system' %}"
              "{{ '<|start_of_role|>system<|end_of_role|>Today\\'s Date: ' + strftime_now('%B %d, %Y') + '.' }}"
              "{{ '<|end_of_text|>\n' }}{% endif %}"),
        dict.fromkeys(("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), ""), "<|end_of_text|>",
        "<|start_of_role|>system<|end_of_role|>Today's Date: January 05, 2026.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[[Hi there<|end_of_text|>]]\n",
        "<|start_of_role|>system<|end_of_role|>Be brief<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[[Hi there<|end_of_text|>]]\n",
        "<|start_of_role|>system<|end_of_role|>Today's Date: January 05, 2026.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[[Hi there<|end_of_text|>]]\n"
        "<|start_of_role|>user<|end_of_role|>And?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>[[The answer<|end_of_text|>]]\n",
    ),
    "command-r": ChatModel(
        turns(CR.format("USER", "{}"), CR.format("CHATBOT", "{}"), CR.format("SYSTEM", "{}"), before="{{ bos_token }}",
              prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
        dict.fromkeys(("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
                       "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"), ""), "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>" + CR.format("USER", "Hello") + CR.format("CHATBOT", "[[Hi there") + "]]",
        "<BOS_TOKEN>" + CR.format("SYSTEM", "Be brief") + CR.format("USER", "Hello")
        + CR.format("CHATBOT", "[[Hi there") + "]]",
        "<BOS_TOKEN>" + CR.format("USER", "Hello") + CR.format("CHATBOT", "[[Hi there") + "]]"
        + CR.format("USER", "And?") + CR.format("CHATBOT", "[[The answer") + "]]",
        bos="<BOS_TOKEN>",
    ),
    "yi, hermes": ChatModel(chatml(), IM, "<|im_end|>", IM_ONE, IM_SYSTEM + IM_ONE, IM_ONE + IM_NEXT),
    "internlm2": ChatModel(
        chatml("{{ bos_token }}"), {**IM, **SP}, "</s>", "<s>" + IM_ONE, "<s>" + IM_SYSTEM + IM_ONE,
        "<s>" + IM_ONE + IM_NEXT, bos="<s>",
    ),
    "vicuna": ChatModel(
        turns("USER: {} ", "ASSISTANT: {}</s>", "{} ", prompt="ASSISTANT:", before="{{ bos_token }}"), SP, "</s>",
        "<s>USER: Hello ASSISTANT:[[ Hi there</s>]]", "<s>Be brief USER: Hello ASSISTANT:[[ Hi there</s>]]",
        "<s>USER: Hello ASSISTANT:[[ Hi there</s>]]USER: And? ASSISTANT:[[ The answer</s>]]",
        bos="<s>", sentencepiece=True,
    ),
    "openchat": ChatModel(
        turns(OPEN_USER, OPEN_BOT, "GPT4 Correct System: {}<|end_of_turn|>", before="{{ bos_token }}",
              prompt="GPT4 Correct Assistant:"),
        {**SP, "<|end_of_turn|>": ""}, "<|end_of_turn|>",
        "<s>" + OPEN_USER.format("Hello") + "GPT4 Correct Assistant:[[ Hi there<|end_of_turn|>]]",
        "<s>GPT4 Correct System: Be brief<|end_of_turn|>" + OPEN_USER.format("Hello")
        + "GPT4 Correct Assistant:[[ Hi there<|end_of_turn|>]]",
        "<s>" + OPEN_USER.format("Hello") + "GPT4 Correct Assistant:[[ Hi there<|end_of_turn|>]]"
        + OPEN_USER.format("And?") + "GPT4 Correct Assistant:[[ The answer<|end_of_turn|>]]",
        bos="<s>", sentencepiece=True,
    ),
    "stablelm2": ChatModel(
        turns("<|user|>\n{}<|endoftext|>\n", "<|assistant|>\n{}<|endoftext|>\n", "<|system|>\n{}<|endoftext|>\n",
              prompt="<|assistant|>\n"), {"<|endoftext|>": ""}, "<|endoftext|>",
        "<|user|>\nHello<|endoftext|>\n<|assistant|>\n[[Hi there<|endoftext|>]]\n",
        "<|system|>\nBe brief<|endoftext|>\n<|user|>\nHello<|endoftext|>\n<|assistant|>\n[[Hi there<|endoftext|>]]\n",
        "<|user|>\nHello<|endoftext|>\n<|assistant|>\n[[Hi there<|endoftext|>]]\n"
        "<|user|>\nAnd?<|endoftext|>\n<|assistant|>\n[[The answer<|endoftext|>]]\n",
    ),
    # Nothing ends an answer but the token of the next user turn, which the model generates to stop.
    "glm4": ChatModel(
        turns("<|user|>\n{}", "<|assistant|>\n{}", "<|system|>\n{}", before="{{ '[gMASK]<sop>' }}",
              prompt="<|assistant|>\n"),
        dict.fromkeys(("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"), ""),
        "<|endoftext|>", "[gMASK]<sop><|user|>\nHello<|assistant|>\n[[Hi there<|user|>]]",
        "[gMASK]<sop><|system|>\nBe brief<|user|>\nHello<|assistant|>\n[[Hi there<|user|>]]",
        "[gMASK]<sop><|user|>\nHello<|assistant|>\n[[Hi there<|user|>]]\nAnd?<|assistant|>\n[[The answer<|user|>]]",
    ),
    "nemotron (llama)": ChatModel(
        tiny.LLAMA3.replace("{{ bos_token }}", "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
                            "{{ '<|start_header_id|>system<|end_header_id|>\n\ndetailed thinking on<|eot_id|>' }}"
                            "{% endif %}"),
        HEADERS | {"<|eot_id|>": ""}, "<|eot_id|>",
        f"{S}detailed thinking on<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]",
        f"{S}Be brief<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]",
        f"{S}detailed thinking on<|eot_id|>{U}Hello<|eot_id|>{A}[[Hi there<|eot_id|>]]"
        f"{U}And?<|eot_id|>{A}[[The answer<|eot_id|>]]",
        bos="<|begin_of_text|>",
    ),
}  # fmt: skip
