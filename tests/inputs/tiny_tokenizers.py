"""Small tokenizers, trained on a few lines, and chat templates of the known model families."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lora_cli.data.encoded_rows import Row

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the answer is forty two.",
    "Hello, how are you? I am fine. What is the capital of France? Paris is the capital.",
    "user assistant system model tool instruction response the the answer answer question",
    "1 2 3 4 5 6 7 8 9 10\n\nline one\nline two\r\n",
]


def build(
    *special: str, eos: str, bos: str | None = None, adds_bos: bool = False, template: Any = None, vocabulary: int = 400
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer like those of GPT-2, Llama 3 and Qwen, with trimmed offsets."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, eos)])
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        core.add_special_tokens([AddedToken(bos, special=True, normalized=False)])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, chat_template=template)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_sentencepiece(template: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer like those of Llama 2 and Mistral: spaces become `▁`, unknown characters become bytes."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    core.train_from_iterator(TEXTS, trainer)
    plain = json.loads(core.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] not in bytes_]
    core = Tokenizer.from_str(json.dumps(plain))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>", chat_template=template
    )


LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# Like Qwen 3: reasoning is written only for answers after the last question, as an empty block if there is none; tools
# are written first, and tool results share one user turn.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The block stops before the end-of-turn token, as in many published templates.
MARKED_SHORT = MARKED.replace("+ '<|im_end|>\n' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}")


def supervised_texts(row: Row, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts of the row's supervised spans."""
    spans: list[list[int]] = []
    previous = -100
    for label in row.labels.tolist():
        if label != -100 and previous == -100:
            spans.append([])
        if label != -100:
            spans[-1].append(label)
        previous = label
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def build_encoder(kind: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of an encoder.

    It writes [CLS] text [SEP] pair [SEP] for BERT, <s> text </s></s> pair </s> for RoBERTa, and text </s> for T5.
    """
    first, last, pair, types = {
        "bert": ("[CLS]", "[SEP]", "[SEP]", 1),
        "roberta": ("<s>", "</s>", "</s> </s>", 0),
        "t5": ("", "</s>", "</s>", 0),
    }[kind]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", *dict.fromkeys(filter(None, (first, last)))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(),
        pair=f"{first} $A {pair} $B:{types} {last}:{types}".strip(),
        special_tokens=[(token, core.token_to_id(token)) for token in special[2:]],
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": last if kind != "bert" else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **names, cls_token=first or None, sep_token=last, bos_token=first or None
    )
