"""Ollama's prompts equal those of the tokenizer's chat template, and no text breaks the syntax of a Modelfile."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from lora_cli.errors import LoraError
from lora_cli.export import probe_chats
from lora_cli.export.ollama import go_template, modelfile
from lora_cli.export.ollama import model as ollama_model
from lora_cli.export.ollama.chat_template import TemplateParts
from lora_cli.export.ollama.modelfile import Instruction
from lora_cli.export.source import ExportOptions, ExportSource
from tests.export import sources
from tests.export.chat_templates import EXPRESSIBLE, REFUSED, _im
from tests.inputs.tiny_tokenizers import CHATML

Exported = tuple[ExportSource, TemplateParts, list[Instruction]]


def llama_source(tokenizer: PreTrainedTokenizerBase, **options: object) -> ExportSource:
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, **options)
    return sources.export_source("some/Model 1", Path("nowhere"), tokenizer, config=config)


def export(source: ExportSource) -> Exported:
    parts = ollama_model.infer_parts(source)
    return source, parts, parse(ollama_model.make_modelfile(source, parts))


def parse(text: str) -> list[Instruction]:
    """Parse a Modelfile like Ollama's parser/parser.go: character by character, with the same states."""
    instructions, state, name, buffer = [], "nil", "", ""
    for char in text:
        blank, line_end = char in " \t", char in "\r\n"
        if state == "nil":
            if char == "#":
                state = "comment"
            elif not blank and not line_end:
                state, buffer = "name", char
        elif state == "comment":
            state = "nil" if line_end else state
        elif state in ("name", "parameter"):
            if blank and buffer.lower() == "parameter" and state == "name":
                state, buffer = "parameter", ""
            elif blank:
                assert state == "parameter" or buffer.lower() in ("from", "template", "system")
                state, name, buffer = "value", buffer.lower(), ""
            else:
                assert char.isascii()
                assert char.isalpha() or (state == "parameter" and (char.isdigit() or char == "_"))
                buffer += char
        elif blank or line_end:
            value = unquote(buffer.strip())
            if value is None or blank:
                buffer += char
            else:
                instructions.append(Instruction(name, value))
                state, buffer = "nil", ""
        elif char.isprintable():
            buffer += char
    assert state in ("nil", "comment", "value")
    if state == "value":
        value = unquote(buffer.strip())
        assert value is not None
        instructions.append(Instruction(name, value))
    return instructions


def unquote(text: str) -> str | None:
    if text[:3] == '"""':
        return text[3:-3] if len(text) >= 6 and text[-3:] == '"""' else None
    if text[:1] == '"':
        return text[1:-1] if len(text) >= 2 and text[-1] == '"' else None
    return text


@pytest.fixture(scope="module", params=EXPRESSIBLE)
def expressible(request: pytest.FixtureRequest) -> tuple[str, Exported]:
    return request.param, export(llama_source(EXPRESSIBLE[request.param][0]()))


def test_every_chat_becomes_the_tokenizers_own_tokens(expressible: tuple[str, Exported]) -> None:
    name, (source, parts, instructions) = expressible
    check = ollama_model.check_template(source, parts, instructions)
    assert check.passed, check.found
    assert (
        check.figures["same"] + check.figures["trimmed"] + check.figures["refused"]
        == len(probe_chats.PROBE_CHATS)
        == 20
    )
    # Two of the twenty chats have whitespace at the ends of contents.
    assert check.figures["trimmed"] <= 2
    assert bool(check.figures["trimmed"]) == ("trims" in check.found)
    assert check.figures["refused"] == (7 if name in ("gemma", "mistral") else 0)


def test_stops_at_every_end_of_a_turn(expressible: tuple[str, Exported]) -> None:
    name, (source, parts, instructions) = expressible
    assert [line.value for line in instructions if line.name == "stop"] == EXPRESSIBLE[name][1]
    assert ollama_model.check_stops(source, parts, instructions).passed
    without_stops = [line for line in instructions if line.name != "stop"]
    assert not ollama_model.check_stops(source, parts, without_stops).passed


CONTENT = st.text(
    st.sampled_from('ab {}"\\\n\t$.<|>%') | st.characters(exclude_categories=["Cs"]), max_size=12
) | st.sampled_from(['"""', "{{", "}}", "{{ .Content }}", "<|im_end|>", "{{/*", '{{"', "\\u007b"])


@settings(max_examples=15, deadline=None)
@given(st.lists(CONTENT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2), st.none() | CONTENT)
def test_any_content_becomes_the_same_text(
    expressible: tuple[str, Exported], texts: list[str], system: str | None
) -> None:
    _, (source, parts, instructions) = expressible
    chat = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    if system is not None and parts.system is not None:
        chat.insert(0, {"role": "system", "content": system})
    chat = parts.trimmed(chat)
    if "</think>" not in str(texts):
        prompt = parts.runtime_bos + ollama_model.ollama_prompt(instructions, chat)
        assert prompt == probe_chats.render_prompt(source.tokenizer, chat)


def test_a_wrong_template_is_found(expressible: tuple[str, Exported]) -> None:
    source, parts, instructions = expressible[1]
    wrong = [line._replace(value=line.value.replace("{{ .Content }}", "{{ .Content }} ")) for line in instructions]
    assert not ollama_model.check_template(source, parts, wrong).passed


@pytest.mark.parametrize("name", REFUSED)
def test_templates_that_cannot_be_expressed_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_model.gguf_format, "check_supported", lambda source, options: None)
    tokenizer, message = REFUSED[name]
    with pytest.raises(LoraError, match="--to ollama: ") as reason:
        ollama_model.check_supported(llama_source(tokenizer()), ExportOptions(None, None, runtime=False))
    assert message in str(reason.value)
    assert reason.value.hint
    assert "\n" not in str(reason.value)


def test_the_demo_model(demo_folder: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(demo_folder), AutoConfig.from_pretrained(demo_folder)
    source, parts, instructions = export(sources.export_source("demo", demo_folder, tokenizer))
    check = ollama_model.check_template(source, parts, instructions)
    assert (check.passed, check.figures["same"]) == (True, 20)
    values = {line.name: line.value for line in instructions}
    assert values["stop"] == "<|im_end|>"
    assert values["num_ctx"] == str(config.max_position_embeddings)
    # Ollama inserts the same system message as the tokenizer's template.
    without_system = probe_chats.render_prompt(tokenizer, [{"role": "user", "content": "a"}])
    assert without_system == probe_chats.render_prompt(
        tokenizer, [{"role": "system", "content": values["system"]}, probe_chats.PROBE_CHATS[0][0] | {"content": "a"}]
    )


def test_system_is_the_default_of_the_chat_template() -> None:
    _, _, instructions = export(llama_source(EXPRESSIBLE["default"][0]()))
    systems = [line.value for line in instructions if line.name == "system"]
    assert systems == ['You are "Tiny", a {{helpful}} model.\nBe good.']
    # The user's own system message replaces it.
    chat = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}]
    assert "Tiny" not in ollama_model.ollama_prompt(instructions, chat)
    assert "Tiny" in ollama_model.ollama_prompt(instructions, chat[1:])
    for name in EXPRESSIBLE.keys() - {"default", "vicuna"}:
        assert not [line for line in export(llama_source(EXPRESSIBLE[name][0]()))[2] if line.name == "system"], name


def test_the_template_has_no_bos_where_ollama_adds_it() -> None:
    for name, in_template in {"llama3": False, "llama3-own-bos": True}.items():
        _, parts, instructions = export(llama_source(EXPRESSIBLE[name][0]()))
        assert (parts.runtime_bos == "") == in_template
        prompt = ollama_model.ollama_prompt(instructions, probe_chats.PROBE_CHATS[0])
        assert prompt.startswith("<|begin_of_text|>") == in_template


def test_differences_in_rare_orders_are_reported() -> None:
    results = {
        name: ollama_model.check_template(*export(llama_source(EXPRESSIBLE[name][0]()))).found
        for name in ("chatml", "qwen3", "preamble", "gemma")
    }
    assert "different text" not in results["chatml"]
    assert "end with an assistant message" in results["qwen3"]
    assert "have a later system message" in results["preamble"]
    assert "system messages are left out" in results["gemma"]


def test_a_template_with_the_current_date_is_reported() -> None:
    dated = "{{ 'It is ' + strftime_now('%d %b %Y') + '.' }}" + CHATML
    check = ollama_model.check_template(*export(llama_source(_im(template=dated))))
    assert check.passed
    assert "the current date" in check.found


@pytest.mark.parametrize(("positions", "expected"), [(2048, ["2048"]), (8192, ["8192"]), (131072, [])])
def test_num_ctx_is_set_up_to_the_largest_context(positions: int, expected: list[str]) -> None:
    _, _, instructions = export(llama_source(EXPRESSIBLE["chatml"][0](), max_position_embeddings=positions))
    assert [line.value for line in instructions if line.name == "num_ctx"] == expected


def test_consecutive_messages_of_one_role_are_merged_as_in_ollama() -> None:
    instructions = [Instruction("template", "{{ range $i, $m := .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}")]
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert ollama_model.ollama_prompt(instructions, chat) == "<user>a\n\nb<assistant>c"


def test_usage_contains_a_valid_model_name(tmp_path: Path) -> None:
    source = llama_source(EXPRESSIBLE["chatml"][0]())
    create, run = ollama_model.usage(source, tmp_path / "my model", ExportOptions(None, None, runtime=False))
    assert create == f"ollama create model-1 -f '{tmp_path}/my model/Modelfile'"
    assert run == "ollama run model-1"


QUOTED = st.text(st.sampled_from('ab "\n\t\r#') | st.characters(), max_size=20) | st.lists(
    st.sampled_from(['"""', '"', "\n", " ", "a", "\nFROM x\n", "PARAMETER stop b", "#"]), max_size=6
).map("".join)


@settings(max_examples=400, deadline=None)
@given(QUOTED, st.sampled_from(["SYSTEM", "TEMPLATE", "PARAMETER stop"]))
@example('"', "SYSTEM")
@example('a"""', "SYSTEM")
@example('""\nFROM b\n', "SYSTEM")
@example('""" \t\nFROM b\n', "SYSTEM")
@example("a\u00a0b", "SYSTEM")
def test_quoted_text_is_parsed_unchanged_or_refused(value: str, command: str) -> None:
    name = command.lower().split()[-1]
    try:
        line = modelfile.format_instruction(command, value)
    except LoraError:
        assert '"""' in value or not all(char.isprintable() or char in "\t\r\n" for char in value)
        return
    assert parse("FROM ./a\n" + line + "SYSTEM x\n") == [
        Instruction("from", "./a"), Instruction(name, value), Instruction("system", "x"),
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["FROM", "SYSTEM", "#", '"""', '"', "\n", " ", "a", "\t", "\u200d"]), max_size=12))
def test_both_parsers_of_modelfiles_agree(parts: list[str]) -> None:
    text = "FROM a\nSYSTEM " + "".join(parts)
    try:
        result = modelfile.parse_modelfile(text)
    except LoraError:
        result = None
    try:
        expected = parse(text)
    except AssertionError:
        expected = None
    assert result == expected


@settings(max_examples=300, deadline=None)
@given(CONTENT | QUOTED.filter(lambda text: text.isprintable()), CONTENT)
@example("{", "a")
@example("{{", '"')
@example('"""\n', '"""\n')
@example("\u200d\U000e0001\u00a0\r", "")
def test_escaped_text_is_output_unchanged(literal: str, content: str) -> None:
    escaped = go_template.escape_text(literal)
    output = go_template.render_go_template(escaped + "{{ .Content }}" + escaped, {"Content": content})
    assert output == literal + content + literal
    assert parse(modelfile.format_instruction("TEMPLATE", escaped)) == [Instruction("template", escaped)]


@pytest.mark.parametrize(
    "template", ["{{ .A", "{{ if true }}", "{{ end }}", "{{ else }}", "{{- .A }}", "{{ $x }}", "{{ nil }}", "{{ 1 }}"]
)
def test_unsupported_syntax_is_not_interpreted(template: str) -> None:
    with pytest.raises(go_template.UnsupportedTemplate):
        go_template.render_go_template(template, {"A": "a"})


def test_half_a_character_is_refused() -> None:
    with pytest.raises(LoraError, match="half a character"):
        go_template.escape_text("a\ud800")
    with pytest.raises(LoraError, match=r"U\+D800"):
        modelfile.format_instruction("SYSTEM", "a\ud800")
