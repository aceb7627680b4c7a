"""A GGUF file is the model: each family in llama.cpp beside transformers, each form within its rounding."""

from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoModelForCausalLM

from lora_cli.errors import LoraError
from lora_cli.export.gguf import architectures, llama_cpp_server, tensors
from lora_cli.export.gguf import model as gguf_model
from lora_cli.export.gguf.tensors import GGUF_QUANTIZATIONS
from lora_cli.export.source import Check, ExportSource
from tests.export.sources import options, subject

COVERED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "falcon", "falcon-40b", "gpt2", "starcoder2",
    "smollm3", "granite", "olmo2",
]  # fmt: skip
SCALED = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def apart(found: ExportSource, file: Path, *, lengths: tuple[int, ...] = (1, 2, 9, 33)) -> float:
    """The largest difference of log-probabilities, relative to the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(found.model).eval()
    size = found.config.get_text_config().vocab_size
    worst = 0.0
    with llama_cpp_server.run_llama_cpp(file, vocabulary=size, context=256) as runtime, torch.inference_mode():
        for length in lengths:
            ids = [5 + 7 * n % 380 for n in range(length)]
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            off = np.abs(logits.log_softmax(-1).numpy() - runtime.logprobs(ids)).max()
            worst = max(worst, float(off / logits.abs().max()))
    return worst


@pytest.mark.parametrize("family", COVERED)
def test_every_family_has_the_logits_of_transformers(family: str, tmp_path: Path):
    found = subject(family, tmp_path / "model")
    gguf_model.refuse(found, options("f32"))
    gguf_model.write(found, tmp_path / "out.gguf", options("f32"))
    # llama.cpp looks GELU up in a table of fp16, which is all that the families with it are apart.
    exact = architectures.find_architecture(found.config).activation == architectures.SILU
    assert apart(found, tmp_path / "out.gguf") < (1e-5 if exact else 1e-3)


@pytest.mark.parametrize("scaling", SCALED)
def test_rotary_scaling_is_the_same(scaling: str, tmp_path: Path):
    found = subject("llama", tmp_path / "model", rope_parameters=SCALED[scaling])
    gguf_model.write(found, tmp_path / "out.gguf", options("f32"))
    assert apart(found, tmp_path / "out.gguf", lengths=(9, 33, 120)) < 1e-5


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    """A tied llama of an odd vocabulary: the tokenizer knows fewer tokens than it has rows."""
    folder = tmp_path_factory.mktemp("tied")
    return subject("llama", folder, tie_word_embeddings=True, vocabulary=431, num_hidden_layers=1)


def checks(found: ExportSource, file: Path, form: str) -> dict[str, Check]:
    gguf_model.write(found, file, options(form))
    return {check.name: check for check in gguf_model.prove(found, file, options(form))}


@pytest.mark.parametrize("form", GGUF_QUANTIZATIONS)
def test_every_form_proves_itself(form: str, tied: ExportSource, tmp_path: Path):
    made = checks(tied, tmp_path / "out.gguf", form)
    assert {name for name, check in made.items() if not check.passed} == set(), made
    assert made.keys() - {"note"} == {"tensors", "chats", "stop", "distribution", "text"}
    assert made["chats"].figures["same"] == 20
    names = {tensor.name: tensor.tensor_type for tensor in library.GGUFReader(str(tmp_path / "out.gguf")).tensors}
    assert "output.weight" not in names
    assert names["blk.0.attn_q.weight"] == GGUF_QUANTIZATIONS[form].type
    assert names["blk.0.attn_norm.weight"].name == "F32"


def test_a_damaged_tensor_is_found_out(tied: ExportSource, tmp_path: Path):
    file = tmp_path / "out.gguf"
    gguf_model.write(tied, file, options("q8_0"))
    tensor = next(t for t in library.GGUFReader(str(file)).tensors if t.name == "blk.0.ffn_up.weight")
    with file.open("r+b") as stream:
        stream.seek(int(tensor.data_offset) + 40)
        stream.write(bytes([int(tensor.data.reshape(-1)[40]) ^ 0x40]))
    first = next(gguf_model.prove(tied, file, options("q8_0", runtime=False)))
    assert not first.passed
    assert "blk.0.ffn_up.weight" in first.found


def test_weights_in_the_wrong_order_are_found_out(tied: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tensors agree with what was meant; only the runtime shows that it was the wrong thing."""
    entry = architectures.ARCHITECTURES["llama"]
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", entry._replace(reordered={}))
    made = checks(tied, tmp_path / "out.gguf", "f16")
    assert made["tensors"].passed
    assert not made["distribution"].passed
    assert not made["text"].passed


def test_a_lost_end_of_turn_is_found_out(tied: ExportSource, tmp_path: Path):
    file = tmp_path / "out.gguf"
    gguf_model.write(tied, file, options("f32"))
    more = tied.tokenizer.convert_tokens_to_ids("<|im_start|>")
    with llama_cpp_server.run_llama_cpp(file, vocabulary=431, context=256) as runtime:
        assert runtime.stops_at(tied.tokenizer.eos_token_id, after=[5, 6])
        assert not runtime.stops_at(more, after=[5, 6])


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float32, (3, 64), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([form for form in GGUF_QUANTIZATIONS if form != "f32"]),
)
def test_rounding_is_no_larger_than_is_allowed(values: np.ndarray, form: str):
    kind = GGUF_QUANTIZATIONS[form].type
    back = library.dequantize(library.quantize(values, kind), kind).reshape(values.shape)
    assert (np.abs(back - values) <= tensors.max_rounding_error(values, kind)).all()


@pytest.mark.parametrize("form", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_allowed_rounding_is_not_generous(form: str):
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    kind = GGUF_QUANTIZATIONS[form].type
    back = library.dequantize(library.quantize(values, kind), kind).reshape(values.shape)
    assert (np.abs(back - values) / tensors.max_rounding_error(values, kind)).max() > 0.45


@pytest.mark.parametrize(
    ("family", "given", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar: 32"),
        ("gemma2", {"tie_word_embeddings": False}, "a head apart from its embeddings"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no rotation in every fourth layer"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: relu"),
        ("falcon", {"alibi": True}, "alibi: True"),
        ("mixtral", {}, "MixtralForCausalLM is not covered"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, given: dict[str, object], says: str, tmp_path: Path
):
    found = subject(family, tmp_path / "model", **given)
    with pytest.raises(LoraError, match=says) as refusal:
        gguf_model.refuse(found, options())
    assert refusal.value.hint


def test_a_form_that_is_not_written_here_is_refused(tied: ExportSource):
    with pytest.raises(LoraError, match="q4_k_m") as refusal:
        gguf_model.refuse(tied, options("q4_k_m"))
    assert "llama-quantize" in str(refusal.value.hint)


def test_fp16_that_overflows_is_refused(tmp_path: Path):
    found = subject("llama", tmp_path / "model", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(found.model)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    model.save_pretrained(found.model)
    with pytest.raises(LoraError, match="ffn_up"):
        gguf_model.write(found, tmp_path / "out.gguf", options("f16"))


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tmp_path: Path):
    found = subject("llama", tmp_path / "model", num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    file = found.model / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "up_proj" not in k}, file, {"format": "pt"})
    with pytest.raises(LoraError, match="up_proj"):
        gguf_model.write(found, tmp_path / "out.gguf", options("f16"))


def test_a_file_that_llama_cpp_cannot_load_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with (
        pytest.raises(LoraError, match=r"llama\.cpp cannot load bad\.gguf: .+"),
        llama_cpp_server.run_llama_cpp(tmp_path / "bad.gguf", vocabulary=3),
    ):
        pass
