"""Opening an adapter folder: every damage of a file is one error that names it, or a note where it decides nothing."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli.data.class_labels import ClassLabels, save_labels
from lora_cli.errors import LoraError
from lora_cli.model import save_adapter
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.load_adapter import load_adapter
from lora_cli.model.trained_on import TrainedOn, write_trained_on
from lora_cli.run.checksums import write_checksums
from tests.model import zoo

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RECORD = TrainedOn(None, "0" * 64, "LlamaForCausalLM", "float32", None)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = Q0.replace("lora_A", "lora_B")


def save(folder: Path, **options: Any) -> Path:
    model = zoo.adapted(zoo.make("llama"), rank=4, target_modules=["q_proj", "v_proj"], **options)
    folder.mkdir(exist_ok=True)
    save_adapter.save_adapter(model, folder, base="org/base", revision=None)
    write_trained_on(RECORD, folder)
    save_labels(ClassLabels("single", ("a", "b")), folder)
    (folder / "README.md").write_text("text")
    (folder / "chat_template.jinja").write_text("template")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(tmp_path / "adapter")


def change_json(file: Path, **values: Any) -> None:
    # json.dumps writes NaN as it is.
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def error_of(folder: Path) -> LoraError:
    with pytest.raises(LoraError) as caught:
        open_adapter(folder)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def test_an_opened_adapter_has_all_that_commands_need(adapter: Path):
    opened = open_adapter(adapter)
    assert (opened.folder, opened.method, opened.step) == (adapter, "lora", None)
    assert opened.trained_on == RECORD
    assert opened.labels == ClassLabels("single", ("a", "b"))
    assert opened.chat_template == "template"
    assert opened.tensors.keys() == opened.load().keys() == load_file(adapter / WEIGHTS).keys()
    (own,) = opened.origins_up_to("runs/a")
    assert (own["adapter"], len(own["digest"]), own["step"]) == ("runs/a", 64, None)


def test_loading_does_not_change_the_opened_configuration(adapter: Path):
    opened = open_adapter(adapter)
    before = opened.config.to_dict()
    load_adapter(zoo.make("llama"), opened, base="base")
    assert opened.config.to_dict() == before


CONFUSED: list[tuple[str, Any, str]] = [
    ("r", 0, "rank 4, and 0"),
    ("r", -1, "is not a number above 0"),
    ("r", "16", "is not an integer"),
    ("r", [8], "is not an integer"),
    ("r", None, "is not an integer"),
    ("r", True, "is not an integer"),
    ("r", 4.0, "is not an integer"),
    ("r", 2**40, "no tensor is that large"),
    ("r", 10**30, "is too large"),
    ("r", 8, "rank 4, and 8 in the configuration"),
    ("lora_alpha", float("nan"), "nan is not a finite number"),
    ("lora_alpha", float("inf"), "inf is not a finite number"),
    ("lora_alpha", 0, "is not the scale of an update"),
    ("lora_alpha", 1e-300, "is not the scale of an update"),
    ("lora_alpha", "8", "is not a number or an integer"),
    ("lora_dropout", 2, "is not a probability"),
    ("bias", "some", "is not none or all or lora_only"),
    ("target_modules", {"q": 1}, "is not a list of texts or a text or null"),
    ("target_modules", ["q_proj", 1], "is not a list of texts or a text or null"),
    ("target_modules", [], "is not among the target_modules"),
    ("target_modules", ["k_proj"], "is not among the target_modules"),
    ("target_modules", "(", "is not a regular expression"),
    ("target_modules", "a{99999999999}", "is not a regular expression"),
    ("exclude_modules", ["q_proj"], "is not among the target_modules"),
    ("layers_to_transform", [7], "is not among the target_modules"),
    ("layers_to_transform", "0", "is not a list"),
    ("modules_to_save", ["("], "is not a regular expression"),
    ("rank_pattern", {"q_proj": "8"}, "is not a rank above 0"),
    ("rank_pattern", {"q_proj": 0}, "is not a rank above 0"),
    ("rank_pattern", {"q_proj": 10**9}, "no tensor is that large"),
    ("rank_pattern", {"q_proj": 8}, "rank 4, and 8 in the configuration"),
    ("rank_pattern", {"(": 4}, "is not a regular expression"),
    ("alpha_pattern", {"q_proj": None}, "is not the scale of an update"),
    ("peft_type", "SUPER", "is not a method of PEFT"),
    ("peft_type", ["LORA"], "is not a method of PEFT"),
    ("task_type", "FLY", "Invalid task type"),
    ("base_model_name_or_path", ["base"], "is not a text or null"),
    ("base_model_name_or_path", "a\x00b", "characters that cannot be printed"),
    ("base_model_name_or_path", "\ud800", "characters that cannot be printed"),
    ("base_model_name_or_path", "a" * 300, "is not a path or hub id"),
    ("use_dora", True, "has no magnitudes of DoRA, and use_dora is true"),
    ("use_dora", "yes", "is not true or false"),
    ("\x1b[2J", 1, "characters that cannot be printed"),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), CONFUSED, ids=[f"{k[:16]!a}-{str(v)[:12]!a}" for k, v, _ in CONFUSED]
)
def test_a_value_that_cannot_be_is_named(key: str, value: Any, message: str, adapter: Path):
    change_json(adapter / CONFIG, **{key: value})
    assert message in error_of(adapter).message


def test_a_number_beyond_all_numbers_is_named(adapter: Path):
    change_json(adapter / CONFIG, lora_alpha="here")
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text().replace('"here"', "1e400"))
    assert "lora_alpha: inf is not a finite number" in error_of(adapter).message


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"]
)
def test_a_regular_expression_that_takes_forever_is_refused_in_seconds(
    key: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lora_cli.model.config_values.MAX_MATCH_S", 0.3)
    slow = r"(\w+\.?)+!"
    change_json(adapter / CONFIG, **{key: {slow: 4} if key.endswith("pattern") else [slow] if "save" in key else slow})
    start = time.monotonic()
    assert "its regular expressions take more than" in error_of(adapter).message
    assert time.monotonic() - start < 10


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
KEYS = sorted(set(LoraConfig().to_dict()) | {"new_key", "runtime_config"})


def read_or_refused(folder: Path) -> None:
    """Open an adapter that may be damaged; an error has one line and one hint, which can be printed."""
    refused = None
    try:
        open_adapter(folder)
    except LoraError as error:
        refused = error
    if refused is not None:
        assert refused.hint
        assert "\n" not in refused.message
        (refused.message + refused.hint).encode()


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=json_values)
def test_any_value_of_any_key_is_read_or_refused(key: str, value: Any, adapter: Path):
    original = (adapter / CONFIG).read_text()
    change_json(adapter / CONFIG, **{key: value})
    read_or_refused(adapter)
    (adapter / CONFIG).write_text(original)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([CONFIG, WEIGHTS, "trained_on.json", "labels.json"]))
def test_any_bytes_in_a_file_are_read_or_refused(data: st.DataObject, name: str, adapter: Path):
    original = (adapter / name).read_bytes()
    at = data.draw(st.integers(0, min(len(original), 2000) - 1))
    changed = data.draw(st.binary(max_size=8))
    (adapter / name).write_bytes(original[:at] + changed + original[at + data.draw(st.integers(0, 20)) :])
    read_or_refused(adapter)
    (adapter / name).write_bytes(original)


def _swap(tensors: dict[str, Tensor]) -> None:
    tensors[Q0], tensors[B0] = tensors[B0], tensors[Q0]


MIXED: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "one of a pair missing": (lambda t: t.__delitem__(B0), "q_proj has a factor A alone"),
    "swapped": (_swap, "q_proj has rank 64, and 4 in the configuration"),
    "transposed": (lambda t: t.__setitem__(Q0, t[Q0].T), "q_proj has factors A and B of 64x4 and 64x4"),
    "flat": (lambda t: t.__setitem__(Q0, t[Q0].flatten()), "q_proj has factors A and B of 256 and 64x4"),
    "no rows": (lambda t: t.update({Q0: t[Q0][:0], B0: t[B0][:, :0]}), "factors A and B of 0x64 and 64x0"),
    "another rank": (lambda t: t.update({Q0: t[Q0][:2], B0: t[B0][:, :2]}), "rank 2, and 4 in the configuration"),
    "integers": (lambda t: t.__setitem__(Q0, t[Q0].int()), "is of I32, not of a floating-point dtype"),
    "another module": (
        lambda t: t.update({n.replace("q_proj", "k_proj"): t[n] for n in (Q0, B0)}),
        "k_proj is not among the target_modules",
    ),
    "an unknown factor": (lambda t: t.__setitem__(Q0.replace("lora_A", "lora_C"), t[Q0]), "is not a tensor of LoRA"),
    "magnitudes": (
        lambda t: t.__setitem__(Q0.replace("lora_A.weight", "lora_magnitude_vector"), t[Q0][0]),
        "has DoRA's magnitudes, and use_dora is false",
    ),
    "none": (lambda t: t.clear(), "has no tensors"),
}


@pytest.mark.parametrize("what", MIXED)
def test_weights_that_do_not_belong_to_the_configuration_are_refused(what: str, adapter: Path):
    change, message = MIXED[what]
    change_tensors(adapter, change)
    assert message in error_of(adapter).message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_value_that_is_not_finite_is_named(dtype: torch.dtype, adapter: Path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[B0] = tensors[B0].to(dtype)
        tensors[B0].view(torch.uint8)[3, -dtype.itemsize :] = 0xFF  # NaN in all these dtypes

    change_tensors(adapter, change)
    assert f"{B0} has a value that is not finite (nan)" in error_of(adapter).message


def test_values_that_are_not_finite_are_counted(adapter: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lora_cli.model.finite.BLOCK_BYTES", 64)
    change_tensors(adapter, lambda t: t[Q0][1:3, ::2].fill_(float("inf")))
    assert f"{Q0} has 64 of 256 values that are not finite (inf)" in error_of(adapter).message


def test_a_pickled_adapter_says_how_it_is_converted(adapter: Path):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    error = error_of(adapter)
    assert error.message.endswith("has no adapter_model.safetensors, only adapter_model.bin")
    assert error.hint == f"convert it: lora adapter convert {adapter} --out DIR"


def _replace(path: Path, what: str) -> None:
    path.unlink()
    match what:
        case "empty":
            path.touch()
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a broken link":
            path.symlink_to("nowhere")
        case "a loop of links":
            path.symlink_to(path.name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "trained_on.json", "labels.json", "chat_template.jinja"])
@pytest.mark.parametrize("what", ["empty", "a folder", "a pipe", "a broken link", "a loop of links"])
def test_an_entry_that_is_not_the_file_is_named(name: str, what: str, adapter: Path):
    _replace(adapter / name, what)
    if (name, what) == ("chat_template.jinja", "empty"):
        assert open_adapter(adapter).chat_template == ""
        return
    assert name in error_of(adapter).message


@pytest.mark.parametrize(
    "record",
    [
        {"fingerprint": None}, {"fingerprint": "abc"}, {"dtype": "__name__"}, {"dtype": "int8"}, {"step": "3"},
        {"step": -1}, {"quantization": {"bits": 3}}, {"quantization": []}, {"prompts": "song"}, {"origins": [{}]},
        {"origins": [{"adapter": "a", "digest": "b", "step": 1, "x": 1}]}, {"template_date": "2026-02-31"},
        {"template_variables": []}, {"architecture": "\x1b[2J"}, {"new_key": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_of_the_base_is_refused(record: dict[str, Any], adapter: Path):
    change_json(adapter / "trained_on.json", **record)
    assert f"trained_on.json: {next(iter(record))}" in error_of(adapter).message.replace("'", "")


@pytest.mark.parametrize(
    "labels",
    [{"kind": "double"}, {"names": []}, {"names": "ab"}, {"names": ["a", "a"]}, {"names": [1]}, {"names": ["\ud800"]},
     {"extra": 1}],
    ids=str,
)  # fmt: skip
def test_damaged_labels_are_refused(labels: dict[str, Any], adapter: Path):
    change_json(adapter / "labels.json", **labels)
    assert "labels.json: " in error_of(adapter).message


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "trained_on.json", "labels.json", "chat_template.jinja"])
def test_a_file_that_is_not_the_verified_one_is_refused(name: str, adapter: Path):
    write_checksums(adapter, kind="adapter", published=True)
    open_adapter(adapter)
    data = bytearray((adapter / name).read_bytes())
    data[-2] ^= 1
    (adapter / name).write_bytes(data)
    error = error_of(adapter)
    assert error.message == (
        f"{adapter} is not the adapter that was verified: {name} has other contents than when it was written"
    )
    assert str(error.hint).endswith(f"if you changed it yourself, remove {adapter}/checksums.json")
    (adapter / name).unlink()
    assert f"{name} is missing" in error_of(adapter).message or name == WEIGHTS


def test_weights_of_another_adapter_of_the_same_shape_are_refused(adapter: Path, tmp_path: Path):
    other = save(tmp_path / "other", seed=1)
    write_checksums(adapter, kind="adapter", published=True)
    os.replace(other / WEIGHTS, adapter / WEIGHTS)
    assert f"{WEIGHTS} has other contents" in error_of(adapter).message


def test_a_decisive_file_that_was_added_is_refused(adapter: Path):
    write_checksums(adapter, kind="adapter", published=True)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert "tokenizer_config.json was not there when the adapter was written" in error_of(adapter).message


def test_a_change_that_decides_nothing_is_told(adapter: Path, capfd: pytest.CaptureFixture[str]):
    write_checksums(adapter, kind="adapter", published=True)
    (adapter / "README.md").write_text("better")
    (adapter / "notes.txt").write_text("mine")
    open_adapter(adapter)
    assert capfd.readouterr().err.splitlines() == [
        f"note: {adapter}: README.md has 6 bytes, not 4 (checksums.json)",
    ]


def test_links_to_the_files_are_followed_as_in_the_cache_of_the_hub(adapter: Path, tmp_path: Path):
    write_checksums(adapter, kind="adapter", published=True)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in adapter.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_adapter(snapshot).tensors.keys() == open_adapter(adapter).tensors.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", zoo.METHODS)
def test_adapters_of_every_method_are_opened_and_loaded(method: str, tmp_path: Path):
    model = zoo.adapted(zoo.make("llama"), method=method)
    expected = save_adapter.adapter_tensors(model)
    save_adapter.save_adapter(model, tmp_path, base="org/base", revision=None)
    opened: AdapterFiles = open_adapter(tmp_path)
    loaded: PeftModel = load_adapter(zoo.make("llama"), opened, base="base")
    for name, tensor in save_adapter.adapter_tensors(loaded).items():
        assert torch.equal(tensor.float(), expected[name].float()), name
