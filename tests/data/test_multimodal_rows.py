"""Rows of text for multimodal bases: templates that read content as parts, processors' templates, tokens of images."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from lora_cli.data.chat_templates import resolve_template
from lora_cli.data.encode import CausalLMEncoder, EncodedRow
from lora_cli.data.formats import Conversation, Document, TokenIds
from lora_cli.data.records import BadRow
from lora_cli.data.rendering import render_template, typed_content
from lora_cli.model.model_source import ModelSource, load_tokenizer
from lora_cli.model.multimodal import placeholder_tokens
from lora_cli.recipe.schema import DataSpec
from tests.inputs.tiny_tokenizers import CHATML, build

# As SmolVLM and Idefics3 publish it: a text that is not a list of parts vanishes without an error.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# As LLaVA 1.5 publishes it, but for its generation blocks.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."}]
SPEC = DataSpec(train="rows.jsonl")


def supervised(row: EncodedRow | BadRow, encoder: CausalLMEncoder) -> str:
    assert isinstance(row, EncodedRow), row
    ids = [int(i) for start, stop in row.supervised_spans for i in row.ids[start:stop]]
    return str(encoder.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize(("source", "typed"), [(SMOLVLM, True), (LLAVA, True), (CHATML, False)])
def test_a_template_gets_content_in_the_form_that_it_renders(source: str, typed: bool):
    tokenizer = build("<|im_start|>", "<image>", eos="<end_of_utterance>", template=source)
    template = resolve_template(None, tokenizer)
    assert template is not None
    assert template.typed is typed
    text = render_template(template, CHAT)
    assert "How are you?" in text
    assert "I am fine." in text
    expected = tokenizer.apply_chat_template(typed_content(CHAT) if typed else CHAT, tokenize=False)
    assert text == expected


def test_an_answer_of_smolvlm_is_learnt_with_its_end():
    tokenizer = build("<|im_start|>", "<image>", eos="<end_of_utterance>", template=SMOLVLM)
    encoder = CausalLMEncoder(SPEC, tokenizer)
    (row,) = encoder.encode([Conversation(CHAT, None)])
    assert supervised(row, encoder).strip() == "I am fine.<end_of_utterance>"


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_the_processor_is_used(name: str, tmp_path: Path):
    build("<|im_start|>", eos="<|im_end|>").save_pretrained(tmp_path)
    assert load_tokenizer(ModelSource(str(tmp_path))).chat_template is None
    (tmp_path / name).write_text(json.dumps({"chat_template": CHATML}))
    assert load_tokenizer(ModelSource(str(tmp_path))).chat_template == CHATML
    build("<|im_start|>", eos="<|im_end|>", template="{{ 'own' }}").save_pretrained(tmp_path)
    assert load_tokenizer(ModelSource(str(tmp_path))).chat_template == "{{ 'own' }}"


def test_a_row_with_the_token_of_an_image_is_bad():
    tokenizer = build("<|im_start|>", "<image>", eos="<|im_end|>", template=CHATML)
    image = tokenizer.convert_tokens_to_ids("<image>")
    encoder = CausalLMEncoder(SPEC, tokenizer, [image])
    chat = [{"role": "user", "content": "What is <image>?"}, CHAT[1]]
    for example in (Conversation(chat, None), Document("see <image>"), TokenIds([5, image, 6], None)):
        (row,) = encoder.encode([example])
        assert isinstance(row, BadRow)
        assert "has <image>, which stands for an image, a video or a sound" in row.problem
        (unchecked,) = CausalLMEncoder(SPEC, tokenizer).encode([example])
        assert isinstance(unchecked, EncodedRow)
    (row,) = encoder.encode([Conversation(CHAT, None)])
    assert isinstance(row, EncodedRow)


def test_rows_of_text_models_have_the_same_identity_as_before():
    tokenizer = build("<|im_start|>", eos="<|im_end|>", template=CHATML)
    assert CausalLMEncoder(SPEC, tokenizer).identity() == CausalLMEncoder(SPEC, tokenizer, []).identity()


def test_the_tokens_that_stand_for_images_are_the_configs():
    tokenizer = build("<image>", "<video>", eos="<|im_end|>")
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<video>"))
    # A default id that the tokenizer has as an ordinary token is not one of them.
    config = AutoConfig.for_model("qwen2_5_vl", image_token_id=image, video_token_id=video, vision_start_token_id=9)
    assert placeholder_tokens(config, tokenizer) == sorted([image, video])
    config = AutoConfig.for_model("gemma3", image_token_index=image, boi_token_index=video)
    assert placeholder_tokens(config, tokenizer) == sorted([image, video])
    assert placeholder_tokens(AutoConfig.for_model("llama"), tokenizer) == []
