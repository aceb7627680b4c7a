"""What Ollama makes of a Modelfile is what the tokenizer makes of its own template, and no text breaks out of one."""

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
from tests.export.chat_templates import EXPRESSIBLE, REFUSED, _im
from tests.inputs.tiny_tokenizers import CHATML

Made = tuple[ExportSource, TemplateParts, list[Instruction]]


def subject(tokenizer: PreTrainedTokenizerBase, **options: object) -> ExportSource:
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, **options)
    return ExportSource("some/Model 1", Path("nowhere"), config, tokenizer, "causal-lm", None, ())


def made(about: ExportSource) -> Made:
    found = ollama_model.infer(about)
    return about, found, read(ollama_model.make_modelfile(about, found))


def read(text: str) -> list[Instruction]:
    """A Modelfile as parser/parser.go of Ollama reads it: character by character, in states as there."""
    commands, state, name, held = [], "nil", "", ""
    for char in text:
        blank, line_end = char in " \t", char in "\r\n"
        if state == "nil":
            if char == "#":
                state = "comment"
            elif not blank and not line_end:
                state, held = "name", char
        elif state == "comment":
            state = "nil" if line_end else state
        elif state in ("name", "parameter"):
            if blank and held.lower() == "parameter" and state == "name":
                state, held = "parameter", ""
            elif blank:
                assert state == "parameter" or held.lower() in ("from", "template", "system")
                state, name, held = "value", held.lower(), ""
            else:
                assert char.isascii()
                assert char.isalpha() or (state == "parameter" and (char.isdigit() or char == "_"))
                held += char
        elif blank or line_end:
            value = unquote(held.strip())
            if value is None or blank:
                held += char
            else:
                commands.append(Instruction(name, value))
                state, held = "nil", ""
        elif char.isprintable():
            held += char
    assert state in ("nil", "comment", "value")
    if state == "value":
        value = unquote(held.strip())
        assert value is not None
        commands.append(Instruction(name, value))
    return commands


def unquote(text: str) -> str | None:
    if text[:3] == '"""':
        return text[3:-3] if len(text) >= 6 and text[-3:] == '"""' else None
    if text[:1] == '"':
        return text[1:-1] if len(text) >= 2 and text[-1] == '"' else None
    return text


@pytest.fixture(scope="module", params=EXPRESSIBLE)
def expressible(request: pytest.FixtureRequest) -> tuple[str, Made]:
    return request.param, made(subject(EXPRESSIBLE[request.param][0]()))


def test_every_chat_becomes_the_tokenizers_own_tokens(expressible: tuple[str, Made]) -> None:
    name, (about, found, told) = expressible
    check = ollama_model.check_template(about, found, told)
    assert check.passed, check.found
    assert (
        check.figures["same"] + check.figures["trimmed"] + check.figures["refused"]
        == len(probe_chats.PROBE_CHATS)
        == 20
    )
    # Two chats of the twenty have white space at the ends of contents.
    assert check.figures["trimmed"] <= 2
    assert bool(check.figures["trimmed"]) == ("takes off" in check.found)
    assert check.figures["refused"] == (7 if name in ("gemma", "mistral") else 0)


def test_stops_at_every_end_of_a_turn(expressible: tuple[str, Made]) -> None:
    name, (about, found, told) = expressible
    assert [command.value for command in told if command.name == "stop"] == EXPRESSIBLE[name][1]
    assert ollama_model.check_stops(about, found, told).passed
    assert not ollama_model.check_stops(about, found, [command for command in told if command.name != "stop"]).passed


CONTENT = st.text(
    st.sampled_from('ab {}"\\\n\t$.<|>%') | st.characters(exclude_categories=["Cs"]), max_size=12
) | st.sampled_from(['"""', "{{", "}}", "{{ .Content }}", "<|im_end|>", "{{/*", '{{"', "\\u007b"])


@settings(max_examples=15, deadline=None)
@given(st.lists(CONTENT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2), st.none() | CONTENT)
def test_any_content_becomes_the_same_text(expressible: tuple[str, Made], texts: list[str], system: str | None) -> None:
    _, (about, found, told) = expressible
    chat = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    if system is not None and found.system is not None:
        chat.insert(0, {"role": "system", "content": system})
    chat = found.trimmed(chat)
    if "</think>" not in str(texts):
        assert found.added + ollama_model.ollama_prompt(told, chat) == probe_chats.render_prompt(about.tokenizer, chat)


def test_a_wrong_template_is_found(expressible: tuple[str, Made]) -> None:
    about, found, told = expressible[1]
    wrong = [command._replace(value=command.value.replace("{{ .Content }}", "{{ .Content }} ")) for command in told]
    assert not ollama_model.check_template(about, found, wrong).passed


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_model.gguf_format, "refuse", lambda subject, options: None)
    tokenizer, word = REFUSED[name]
    with pytest.raises(LoraError, match="--to ollama: ") as reason:
        ollama_model.refuse(subject(tokenizer()), ExportOptions(None, None, runtime=False))
    assert word in str(reason.value)
    assert reason.value.hint
    assert "\n" not in str(reason.value)


def test_the_demo_model(demo_folder: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(demo_folder), AutoConfig.from_pretrained(demo_folder)
    about, found, told = made(ExportSource("demo", demo_folder, config, tokenizer, "causal-lm", None, ()))
    check = ollama_model.check_template(about, found, told)
    assert (check.passed, check.figures["same"]) == (True, 20)
    values = {command.name: command.value for command in told}
    assert values["stop"] == "<|im_end|>"
    assert values["num_ctx"] == str(config.max_position_embeddings)
    # The system message that Ollama puts in is the one that the tokenizer's template does.
    alone = probe_chats.render_prompt(tokenizer, [{"role": "user", "content": "a"}])
    assert alone == probe_chats.render_prompt(
        tokenizer, [{"role": "system", "content": values["system"]}, probe_chats.PROBE_CHATS[0][0] | {"content": "a"}]
    )


def test_system_is_the_default_of_the_chat_template() -> None:
    _, _, told = made(subject(EXPRESSIBLE["default"][0]()))
    systems = [command.value for command in told if command.name == "system"]
    assert systems == ['You are "Tiny", a {{helpful}} model.\nBe good.']
    # One of the user's own comes instead of it.
    chat = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}]
    assert "Tiny" not in ollama_model.ollama_prompt(told, chat)
    assert "Tiny" in ollama_model.ollama_prompt(told, chat[1:])
    for name in EXPRESSIBLE.keys() - {"default", "vicuna"}:
        assert not [line for line in made(subject(EXPRESSIBLE[name][0]()))[2] if line.name == "system"], name


def test_bos_is_left_to_ollama_where_it_adds_it() -> None:
    for name, there in {"llama3": False, "llama3-own-bos": True}.items():
        _, found, told = made(subject(EXPRESSIBLE[name][0]()))
        assert (found.added == "") == there
        assert ollama_model.ollama_prompt(told, probe_chats.PROBE_CHATS[0]).startswith("<|begin_of_text|>") == there


def test_seldom_orders_are_told_of() -> None:
    told = {
        name: ollama_model.check_template(*_arranged(name)).found for name in ("chatml", "qwen3", "preamble", "gemma")
    }
    assert "other text" not in told["chatml"]
    assert "end with the assistant" in told["qwen3"]
    assert "have a later system message" in told["preamble"]
    assert "system messages are left out" in told["gemma"]


def _arranged(name: str) -> Made:
    return made(subject(EXPRESSIBLE[name][0]()))


def test_a_template_with_the_day_in_it_is_told_of() -> None:
    dated = "{{ 'It is ' + strftime_now('%d %b %Y') + '.' }}" + CHATML
    check = ollama_model.check_template(*made(subject(_im(template=dated))))
    assert check.passed
    assert "the day's date" in check.found


@pytest.mark.parametrize(("positions", "told"), [(2048, ["2048"]), (8192, ["8192"]), (131072, [])])
def test_a_context_is_told_where_ollamas_own_would_be_less(positions: int, told: list[str]) -> None:
    _, _, commands = made(subject(EXPRESSIBLE["chatml"][0](), max_position_embeddings=positions))
    assert [command.value for command in commands if command.name == "num_ctx"] == told


def test_neighbours_of_one_role_are_merged_as_ollama_does() -> None:
    told = [Instruction("template", "{{ range $i, $m := .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}")]
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert ollama_model.ollama_prompt(told, chat) == "<user>a\n\nb<assistant>c"


def test_usage_names_a_model_that_ollama_takes(tmp_path: Path) -> None:
    about = subject(EXPRESSIBLE["chatml"][0]())
    create, run = ollama_model.usage(about, tmp_path / "my model", ExportOptions(None, None, runtime=False))
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
def test_quoted_text_is_read_as_it_is_or_refused(value: str, command: str) -> None:
    name = command.lower().split()[-1]
    try:
        line = modelfile.format_instruction(command, value)
    except LoraError:
        assert '"""' in value or not all(char.isprintable() or char in "\t\r\n" for char in value)
        return
    assert read("FROM ./a\n" + line + "SYSTEM x\n") == [
        Instruction("from", "./a"), Instruction(name, value), Instruction("system", "x"),
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["FROM", "SYSTEM", "#", '"""', '"', "\n", " ", "a", "\t", "\u200d"]), max_size=12))
def test_both_readers_of_modelfiles_agree(parts: list[str]) -> None:
    text = "FROM a\nSYSTEM " + "".join(parts)
    try:
        found = modelfile.parse_modelfile(text)
    except LoraError:
        found = None
    try:
        expected = read(text)
    except AssertionError:
        expected = None
    assert found == expected


@settings(max_examples=300, deadline=None)
@given(CONTENT | QUOTED.filter(lambda text: text.isprintable()), CONTENT)
@example("{", "a")
@example("{{", '"')
@example('"""\n', '"""\n')
@example("\u200d\U000e0001\u00a0\r", "")
def test_escaped_text_is_put_out_as_it_is(literal: str, content: str) -> None:
    made = go_template.escape_text(literal)
    assert (
        go_template.render_go_template(made + "{{ .Content }}" + made, {"Content": content})
        == literal + content + literal
    )
    assert read(modelfile.format_instruction("TEMPLATE", made)) == [Instruction("template", made)]


@pytest.mark.parametrize(
    "template", ["{{ .A", "{{ if true }}", "{{ end }}", "{{ else }}", "{{- .A }}", "{{ $x }}", "{{ nil }}", "{{ 1 }}"]
)
def test_what_is_not_written_is_not_interpreted(template: str) -> None:
    with pytest.raises(go_template.UnsupportedTemplate):
        go_template.render_go_template(template, {"A": "a"})


def test_half_a_character_is_refused() -> None:
    with pytest.raises(LoraError, match="half a character"):
        go_template.escape_text("a\ud800")
    with pytest.raises(LoraError, match=r"U\+D800"):
        modelfile.format_instruction("SYSTEM", "a\ud800")
