"""Tokenizers with chat templates of every kind that an Ollama template must express, and of some that it cannot."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerFast

from tests.inputs.tiny_tokenizers import CHATML, GEMMA, LLAMA3, MARKED, MARKED_SHORT, MISTRAL, QWEN3, build

# Like Qwen 2.5 and SmolLM2: a chat without a system message gets a default one.
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"Tiny\", a {{helpful}} model.\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)

# Like Llama 3.1: there is always a system turn, which begins with a few fixed lines.
PREAMBLE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' + system }}"
    "{{ '<|eot_id|>' }}{% for message in rest %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_ALTERNATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}"
)

# Like Gemma 3 and Llama 2: the system message begins the first user turn.
GEMMA3 = (
    "{{ bos_token }}" + _ALTERNATE + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') }}"
    "{{ '\n' + (system + '\n\n' if loop.first and system is defined else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = (
    _ALTERNATE + "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)

# Like Mistral 0.3: the system message begins the last user turn.
MISTRAL3 = (
    "{{ bos_token }}" + _ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

# Like Phi 3: the token that ends a chat is not the one that ends a turn; an empty system message gives no system turn.
PHI3 = (
    "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Like Alpaca and Vicuna: no special tokens except EOS, and a text before the first turn.
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}{{ 'A chat.' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)

# The first user turn differs from the later ones.
FIRST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ('Question:\n' if loop.first else '<|im_start|>And:\n') + message['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>Answer:\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>Answer:\n' }}{% endif %}"
)

# Texts that Go's template language or the parser of Modelfiles could take for syntax.
HOSTILE = (
    '{% for message in messages %}{{ \'"""\nFROM x\n{{ .Prompt }}{\' }}'
    "{{ message['role'] + '\\\\u007b\r\n\u200d\u00a0' }}"
    "{{ '{{' + message['content'] + '}}{{/* \"' + '\"' * 4 + '\t <|im_end|>' }}{% endfor %}{{ '{{{ \"' }}"
)

_im = partial(build, "<|im_start|>", "<|endoftext|>", eos="<|im_end|>")
_llama = partial(
    build, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", eos="<|end_of_text|>", bos="<|begin_of_text|>"
)
_gemma = partial(build, "<start_of_turn>", "<end_of_turn>", eos="<eos>", bos="<bos>", adds_bos=True)
_inst = partial(build, "[INST]", "[/INST]", eos="</s>", bos="<s>", adds_bos=True)

# By name: the tokenizer, and its stop texts.
EXPRESSIBLE: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], list[str]]] = {
    "chatml": (partial(_im, template=CHATML), ["<|im_end|>"]),
    "chatml-bos": (partial(_im, template=CHATML, bos="<|im_start|>"), ["<|im_end|>"]),
    "system-bos": (
        partial(_im, template="{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + CHATML, bos="<s>"),
        ["<|im_end|>"],
    ),
    "qwen3": (partial(_im, template=QWEN3), ["<|im_end|>"]),
    "marked": (partial(_im, template=MARKED), ["<|im_end|>"]),
    "marked-short": (partial(_im, template=MARKED_SHORT), ["<|im_end|>"]),
    "default": (partial(_im, template=DEFAULT), ["<|im_end|>"]),
    "llama3": (partial(_llama, template=LLAMA3, adds_bos=True), ["<|end_of_text|>", "<|eot_id|>"]),
    "llama3-own-bos": (partial(_llama, template=LLAMA3), ["<|end_of_text|>", "<|eot_id|>"]),
    "preamble": (partial(_llama, template=PREAMBLE, adds_bos=True), ["<|end_of_text|>", "<|eot_id|>"]),
    "gemma": (partial(_gemma, template=GEMMA), ["<eos>", "<end_of_turn>"]),
    "gemma3": (partial(_gemma, template=GEMMA3), ["<eos>", "<end_of_turn>"]),
    "mistral": (partial(_inst, template=MISTRAL), ["</s>"]),
    "mistral3": (partial(_inst, template=MISTRAL3), ["</s>"]),
    "llama2": (partial(_inst, template=LLAMA2), ["</s>"]),
    "phi3": (
        partial(build, "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", eos="<|endoftext|>", template=PHI3),
        ["<|endoftext|>", "<|end|>"],
    ),
    "vicuna": (partial(build, eos="</s>", template=VICUNA), ["</s>"]),
    "first": (partial(_im, template=FIRST), ["<|im_end|>"]),
    "hostile": (partial(_im, template=HOSTILE), ["<|im_end|>"]),
}

_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + CONTENT + '<|im_end|>\n' }}"
_EACH = "{% for message in messages %}" + _TURN + "{% endfor %}{{ '<|im_start|>assistant\n' }}"

# By name: the tokenizer, and a part of the error message.
REFUSED: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "none": (partial(_im, template=None), "no chat template"),
    "changed": (partial(_im, template=_EACH.replace("CONTENT", "message['content'] | upper")), "changes them"),
    "twice": (partial(_im, template=_EACH.replace("CONTENT", "message['content'] * 2")), "repeats"),
    "numbered": (partial(_im, template=_EACH.replace("CONTENT", "loop.index | string + message['content']")), "'"),
    "last": (partial(_im, template=_EACH.replace("CONTENT", "('!' if loop.last else '') + message['content']")), "!'"),
    "looks": (partial(_im, template=_EACH.replace("CONTENT", "(message['content'] or 'empty')")), "user\\nempty"),
    "one-turn": (partial(_im, template="{{ raise_exception('no') if messages[1:] else 'a' }}"), "refuses"),
    "stray-bos": (partial(_inst, template=CHATML), "in front of every prompt"),
    "invisible-default": (partial(_im, template=DEFAULT.replace("Be good", "Be\u200dgood")), "U+200D"),
    "quotes-default": (partial(_im, template=DEFAULT.replace("model.", 'model """')), "three quotes"),
}
