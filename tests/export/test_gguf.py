"""GGUF export of models: each architecture in llama.cpp and transformers, each quantization within its rounding."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoModelForCausalLM

from lora_cli.data.template_variables import with_defaults
from lora_cli.errors import LoraError
from lora_cli.export.gguf import architectures, llama_cpp_server, tensors
from lora_cli.export.gguf import model as gguf_model
from lora_cli.export.gguf.tensors import GGUF_QUANTIZATIONS
from lora_cli.export.source import Check, ExportSource
from tests.export.sources import options, tiny_source, tokenizer
from tests.inputs.chat_models import MODELS

pytestmark = pytest.mark.slow

SUPPORTED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "falcon", "falcon-40b", "gpt2", "starcoder2",
    "smollm3", "granite", "olmo2",
]  # fmt: skip
ROPE_SCALING = {
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


def max_difference(source: ExportSource, file: Path, *, lengths: tuple[int, ...] = (1, 2, 9, 33)) -> float:
    """Return the largest difference of log-probabilities, relative to the largest logit."""
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    vocab_size = source.config.get_text_config().vocab_size
    worst = 0.0
    with (
        llama_cpp_server.run_llama_cpp(file, vocab_size=vocab_size, context_length=256) as runtime,
        torch.inference_mode(),
    ):
        for length in lengths:
            ids = [5 + 7 * n % 380 for n in range(length)]
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            difference = np.abs(logits.log_softmax(-1).numpy() - runtime.logprobs(ids)).max()
            worst = max(worst, float(difference / logits.abs().max()))
    return worst


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_has_the_logits_of_transformers(family: str, tmp_path: Path):
    source = tiny_source(family, tmp_path / "model")
    gguf_model.check_supported(source, options("f32"))
    gguf_model.write(source, tmp_path / "out.gguf", options("f32"))
    # llama.cpp computes GELU by an fp16 lookup table, which is the only difference of the families with GELU.
    exact = architectures.find_architecture(source.config).activation == architectures.SILU
    assert max_difference(source, tmp_path / "out.gguf") < (1e-5 if exact else 1e-3)


@pytest.mark.parametrize("scaling", ROPE_SCALING)
def test_rope_scaling_is_the_same(scaling: str, tmp_path: Path):
    source = tiny_source("llama", tmp_path / "model", rope_parameters=ROPE_SCALING[scaling])
    gguf_model.write(source, tmp_path / "out.gguf", options("f32"))
    assert max_difference(source, tmp_path / "out.gguf", lengths=(9, 33, 120)) < 1e-5


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    """A llama with tied embeddings and an odd vocabulary size: it has more rows than the tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("tied")
    return tiny_source("llama", folder, tie_word_embeddings=True, vocabulary=431, num_hidden_layers=1)


def checks(source: ExportSource, file: Path, quantize: str) -> dict[str, Check]:
    gguf_model.write(source, file, options(quantize))
    return {check.name: check for check in gguf_model.verify(source, file, options(quantize))}


@pytest.mark.parametrize("quantize", GGUF_QUANTIZATIONS)
def test_every_quantization_passes_its_checks(quantize: str, tied: ExportSource, tmp_path: Path):
    results = checks(tied, tmp_path / "out.gguf", quantize)
    assert {name for name, check in results.items() if not check.passed} == set(), results
    assert results.keys() - {"note"} == {"tensors", "chats", "stop", "distribution", "text"}
    assert results["chats"].figures["same"] == 20
    names = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(str(tmp_path / "out.gguf")).tensors}
    assert "output.weight" not in names
    assert names["blk.0.attn_q.weight"] == GGUF_QUANTIZATIONS[quantize].type
    assert names["blk.0.attn_norm.weight"].name == "F32"


@pytest.mark.parametrize("variables", [{"enable_thinking": False}, {"enable_thinking": True}, {}])
def test_llama_cpp_prompts_a_thinking_model_as_in_training_with_the_printed_options(
    variables: dict[str, bool], tmp_path: Path
):
    """By itself, llama.cpp turns reasoning on in every template."""
    thinking = MODELS["qwen3"].tokenizer()
    thinking.chat_template = with_defaults(thinking.chat_template, variables)
    source = tiny_source("qwen3", tmp_path / "model", tokenizer=thinking, num_hidden_layers=1)
    check = checks(source, tmp_path / "out.gguf", "f32")["chats"]
    assert (check.passed, check.figures["same"]) == (True, 20), check
    printed = gguf_model.usage(source, Path("out.gguf"), options("f32"))
    off = " --chat-template-kwargs '{\"enable_thinking\": false}'" if variables.get("enable_thinking") is False else ""
    assert printed == [f"{program} -m out.gguf --jinja{off}" for program in ("llama-cli", "llama-server")]


def test_the_first_chat_with_other_tokens_is_shown(tied: ExportSource, tmp_path: Path):
    """llama.cpp writes a system message into the user's, where the template omits it."""
    silent = tokenizer()
    assert isinstance(silent.chat_template, str)
    silent.chat_template = (
        "{% for message in messages if message.role != 'system' %}" + silent.chat_template.partition("%}")[2]
    )
    source = tied._replace(base=tied.base._replace(tokenizer=silent))
    check = checks(source, tmp_path / "out.gguf", "f32")["chats"]
    assert not check.passed
    assert "; different: chats 1, 3, 5, 9, 12, 15, 16; in chat 1: " in check.found


def test_a_damaged_tensor_fails_the_check(tied: ExportSource, tmp_path: Path):
    file = tmp_path / "out.gguf"
    gguf_model.write(tied, file, options("q8_0"))
    tensor = next(t for t in gguf.GGUFReader(str(file)).tensors if t.name == "blk.0.ffn_up.weight")
    with file.open("r+b") as stream:
        stream.seek(int(tensor.data_offset) + 40)
        stream.write(bytes([int(tensor.data.reshape(-1)[40]) ^ 0x40]))
    first = next(gguf_model.verify(tied, file, options("q8_0", runtime=False)))
    assert not first.passed
    assert "blk.0.ffn_up.weight" in first.found


def test_rows_in_the_wrong_order_fail_the_output_checks(
    tied: ExportSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The tensors match the plan; only llama.cpp shows that the plan is wrong."""
    entry = architectures.ARCHITECTURES["llama"]
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", entry._replace(row_orders={}))
    results = checks(tied, tmp_path / "out.gguf", "f16")
    assert results["tensors"].passed
    assert not results["distribution"].passed
    assert not results["text"].passed


def test_llama_cpp_stops_only_at_eos(tied: ExportSource, tmp_path: Path):
    file = tmp_path / "out.gguf"
    gguf_model.write(tied, file, options("f32"))
    other = tied.tokenizer.convert_tokens_to_ids("<|im_start|>")
    with llama_cpp_server.run_llama_cpp(file, vocab_size=431, context_length=256) as runtime:
        assert runtime.stops_at(tied.tokenizer.eos_token_id, after=[5, 6])
        assert not runtime.stops_at(other, after=[5, 6])


@settings(max_examples=40, deadline=None)
@given(
    arrays.arrays(np.float32, (3, 64), elements=st.floats(-1e4, 1e4, width=32)),
    st.sampled_from([name for name in GGUF_QUANTIZATIONS if name != "f32"]),
)
def test_rounding_errors_are_within_the_allowed_error(values: np.ndarray, quantize: str):
    kind = GGUF_QUANTIZATIONS[quantize].type
    back = gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape)
    assert (np.abs(back - values) <= tensors.max_rounding_error(values, kind)).all()


@pytest.mark.parametrize("quantize", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_the_allowed_rounding_error_is_tight(quantize: str):
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    kind = GGUF_QUANTIZATIONS[quantize].type
    back = gguf.dequantize(gguf.quantize(values, kind), kind).reshape(values.shape)
    assert (np.abs(back - values) / tensors.max_rounding_error(values, kind)).max() > 0.45


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar: 32"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "without RoPE in every fourth layer"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: relu"),
        ("falcon", {"alibi": True}, "alibi: True"),
        ("mixtral", {}, "MixtralForCausalLM is not supported"),
    ],
)
def test_configs_that_llama_cpp_does_not_support_are_refused(
    family: str, config: dict[str, object], message: str, tmp_path: Path
):
    source = tiny_source(family, tmp_path / "model", **config)
    with pytest.raises(LoraError, match=message) as refusal:
        gguf_model.check_supported(source, options())
    assert refusal.value.hint


def test_an_unsupported_quantization_is_refused(tied: ExportSource):
    with pytest.raises(LoraError, match="q4_k_m") as refusal:
        gguf_model.check_supported(tied, options("q4_k_m"))
    assert "llama-quantize" in str(refusal.value.hint)


def test_fp16_that_overflows_is_refused(tmp_path: Path):
    source = tiny_source("llama", tmp_path / "model", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e5
    model.save_pretrained(source.folder)
    with pytest.raises(LoraError, match="ffn_up"):
        gguf_model.write(source, tmp_path / "out.gguf", options("f16"))


def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path: Path):
    source = tiny_source("llama", tmp_path / "model", num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    file = source.folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "up_proj" not in k}, file, {"format": "pt"})
    with pytest.raises(LoraError, match="up_proj"):
        gguf_model.write(source, tmp_path / "out.gguf", options("f16"))


def test_a_file_that_llama_cpp_cannot_load_is_an_error_of_one_line(tmp_path: Path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with (
        pytest.raises(LoraError, match=r"llama\.cpp cannot load bad\.gguf: .+"),
        llama_cpp_server.run_llama_cpp(tmp_path / "bad.gguf", vocab_size=3),
    ):
        pass
