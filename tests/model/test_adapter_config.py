"""Reading adapter_config.json: unknown keys, fields that are honored or refused, broken files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig

from lora_cli.errors import LoraError
from lora_cli.model import adapter_config
from lora_cli.model.adapter_config import read_adapter_config


def write(folder: Path, keys: dict[str, Any] | None = None, *, method: str = "LORA") -> Path:
    (folder / "adapter_model.safetensors").touch()
    text = json.dumps({"peft_type": method, "base_model_name_or_path": "base", **(keys or {})})
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_every_field_of_a_lora_configuration_is_honored_or_refused():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    classified = adapter_config.LORA_FIELDS | adapter_config.REFUSED_LORA_FIELDS.keys()
    assert fields <= classified, f"PEFT {peft.__version__} has new fields: {sorted(fields - classified)}"
    assert not adapter_config.LORA_FIELDS & adapter_config.REFUSED_LORA_FIELDS.keys()


SET = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"tensor_parallel": 1},
    "monteclora_config": {"num_samples": 4},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
}


@pytest.mark.parametrize("name", adapter_config.REFUSED_LORA_FIELDS)
def test_a_field_that_cannot_be_honored_is_refused_by_name(name: str, tmp_path: Path):
    write(tmp_path, {name: SET[name]})
    with pytest.raises(LoraError, match=rf"adapter_config.json: {name}: .* is not supported: "):
        read_adapter_config(tmp_path)
    write(tmp_path, {name: None})
    assert getattr(read_adapter_config(tmp_path), name) is None


def test_a_field_that_a_newer_peft_knows_is_refused_if_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter_config, "LORA_FIELDS", adapter_config.LORA_FIELDS - {"use_dora"})
    read_adapter_config(write(tmp_path, {"use_dora": False}))
    with pytest.raises(LoraError, match=r"use_dora: true is not supported: .* lora does not know it"):
        read_adapter_config(write(tmp_path, {"use_dora": True}))


@pytest.mark.parametrize("method", ["LORA", "VERA", "PREFIX_TUNING"])
@pytest.mark.parametrize("value", [True, 4, 0.5, "mean", [1], {"a": 1}])
def test_a_key_that_peft_does_not_know_is_refused_if_set(method: str, value: object, tmp_path: Path):
    write(tmp_path, {"use_new_scaling": value, "peft_version": "9.9"}, method=method)
    with pytest.raises(LoraError) as caught:
        read_adapter_config(tmp_path)
    shown = json.dumps(value)
    assert f"use_new_scaling: {shown} is unknown to PEFT {peft.__version__}" in caught.value.message
    assert "(saved by PEFT 9.9)" in caught.value.message


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [None, False, [], {}, "", 0])
def test_an_unknown_key_that_is_not_set_passes_without_a_warning(value: object, tmp_path: Path):
    write(tmp_path, {"use_new_scaling": value, "unsloth_fixed": True, "corda_config": {"corda_method": "kpm"}})
    assert isinstance(read_adapter_config(tmp_path), LoraConfig)


@pytest.mark.parametrize(("method", "keys"), [("XLORA", {"adapters": {"a": "x"}}), ("SHADOW", {"shadow_model": "x"})])
def test_a_method_that_loads_other_folders_is_refused(method: str, keys: dict[str, Any], tmp_path: Path):
    with pytest.raises(LoraError, match=rf"{next(iter(keys))}: .* is not supported: PEFT would load what it names"):
        read_adapter_config(write(tmp_path, keys, method=method))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_an_adapter_of_changed_base_weights_is_refused(init: str, tmp_path: Path):
    write(tmp_path, {"init_lora_weights": init, "loftq_config": {"loftq_bits": 4} if init == "loftq" else {}})
    with pytest.raises(LoraError, match=rf"changed the base weights .*init_lora_weights: {init}"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has a list in place of a JSON object"),
        ("{}", "peft_type None is not a method"),
        ('{"peft_type": "SUPER"}', "peft_type SUPER is not a method"),
        ('{"peft_type": "LORA", "task_type": "FLY"}', "Invalid task type"),
        ('{"peft_type": "OFT", "r": 8}', "OFT has been updated since PEFT 0.14.0"),
    ],
)
def test_a_broken_file_is_one_line(text: str, message: str, tmp_path: Path):
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraError, match=message):
        read_adapter_config(tmp_path)
