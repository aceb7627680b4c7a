"""A GGUF file is dequantized once to a cached folder, with the values of its blocks; packed layers pass gradients."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from lora_cli.data.encode import CausalLMEncoder
from lora_cli.errors import LoraError
from lora_cli.model import attach_adapter, gguf_base, prequantized, save_adapter
from lora_cli.model.gguf_base import (
    GgufExperts,
    GgufLinear,
    PackedLora,
    choose_packed,
    make_packed_layers_differentiable,
    unpack_gguf,
)
from lora_cli.model.prequantized import Prequantized
from lora_cli.recipe.schema import AdapterSpec, DataSpec
from lora_cli.run import disk_space
from tests.faults.damage import damages
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo
from tests.support import checkpoints

TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf.GGMLQuantizationType.Q4_1,  # as in the demo model
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k in llama.cpp's order of rotary pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, ggml_type: str) -> dict[str, torch.Tensor]:
    """Write the tiny llama as llama.cpp's converter does; return the dequantized weights by transformers' names."""
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    model = zoo.make("llama", vocab_size=len(tokenizer))
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_chat_template(CHATML)
    expected = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        *_, layer, part = ["", *name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)]
        gguf_name = GGUF_NAMES.get(name) or f"blk.{layer}.{GGUF_LAYER_NAMES[part]}.weight"
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
        stored = interleave(weight, heads) if heads else weight
        gguf_type = TYPES[ggml_type] if weight.ndim == 2 else TYPES["F32"]
        blocks = gguf.quantize(np.ascontiguousarray(stored), gguf_type)
        writer.add_tensor(gguf_name, blocks, raw_dtype=gguf_type)
        value = gguf.dequantize(blocks, gguf_type)
        if heads:
            value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        expected[name] = torch.tensor(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path, "Q8_0")
    return path


def no_output(line: str) -> None:
    pass


@pytest.mark.parametrize("ggml_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_has_the_dequantized_values_of_its_blocks(tmp_path: Path, ggml_type: str, dtype: torch.dtype):
    path = tmp_path / f"tiny.{ggml_type}.gguf"
    expected = write_gguf(path, ggml_type)
    folder = unpack_gguf(path, dtype=dtype, cache=tmp_path, info=no_output)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == dtype
        assert torch.equal(weights[name], tensor.to(dtype)), name
    ids = torch.arange(3, 40)[None]
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_the_tokenizer_is_the_same(file: Path, tmp_path: Path):
    folder = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=no_output)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Hello, how are you?\n\n 42", "<|im_start|>user\nüñ<|im_end|>"):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_progress_bar_is_disabled_during_the_read_only(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=no_output)
    assert "GGUF tensors" not in capsys.readouterr().err
    assert modeling_gguf_pytorch_utils.tqdm is tqdm
    with pytest.raises(ValueError, match="unreadable"), gguf_base._no_progress_bar():
        raise ValueError("unreadable")
    assert modeling_gguf_pytorch_utils.tqdm is tqdm


def test_the_second_call_returns_the_cached_folder(file: Path, tmp_path: Path):
    messages: list[str] = []
    first = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=messages.append)
    # Without checksums.json, whose time is that of the last use.
    written = [path for path in first.iterdir() if path.name != "checksums.json"]
    mtimes = {path: path.stat().st_mtime_ns for path in written}
    assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=messages.append) == first
    assert {path: path.stat().st_mtime_ns for path in written} == mtimes
    assert len(messages) == 1
    assert unpack_gguf(file, dtype=torch.bfloat16, cache=tmp_path, info=messages.append) != first
    file.touch()  # its contents may have changed
    assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=messages.append) != first


@pytest.mark.slow
def test_a_damaged_folder_is_told_and_unpacked_again(file: Path, tmp_path: Path):
    folder = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=no_output)
    other = unpack_gguf(file, dtype=torch.bfloat16, cache=tmp_path, info=no_output)
    expected = (folder / "model.safetensors").read_bytes()
    names = ["flip-bit", "truncate", "remove", "fifo-in-place", "swap", "foreign", "stray-file-in", "empty-folder"]
    intact = Path(shutil.copytree(folder, tmp_path / "intact"))
    for damage in damages(intact, seed=1, other=other, kinds=names):
        if "model.safetensors" not in damage.name and not damage.name.endswith("/"):
            continue
        shutil.rmtree(folder)
        shutil.copytree(intact, folder)
        damage.apply(folder)
        messages: list[str] = []
        assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=messages.append) == folder
        assert messages[0].startswith(f"cache: {folder} is damaged: "), damage.name
        assert messages[0].endswith("; making the unpacked tiny.Q8_0.gguf again"), damage.name
        assert (folder / "model.safetensors").read_bytes() == expected


def test_a_disk_without_space_for_the_weights_is_an_error(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, free=1000))
    with pytest.raises(LoraError, match=r"are needed for the unpacked weights of tiny\.Q8_0\.gguf, and 1 KiB"):
        unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=no_output)
    assert [path.name[:6] for path in (tmp_path / "gguf").iterdir()] == [".lock-"]


def test_without_weights_config_and_tokenizer_are_the_same(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    messages: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.model.gguf_base.AutoModelForCausalLM", None)
        light = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=messages.append, weights=False)
        assert unpack_gguf(file, dtype=torch.bfloat16, cache=tmp_path, info=messages.append, weights=False) == light
    assert messages == [f"reading config and tokenizer of tiny.Q8_0.gguf once; cached in {light}"]
    assert not list(light.glob("*.safetensors"))
    full = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=no_output)
    assert full != light
    assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=no_output, weights=False) == full
    encoders = [CausalLMEncoder(DataSpec(train="x"), AutoTokenizer.from_pretrained(folder)) for folder in (light, full)]
    assert encoders[0].identity() == encoders[1].identity()
    shapes = [
        {name: p.shape for name, p in checkpoints.checkpoint(folder).skeleton().named_parameters()}
        for folder in (light, full)
    ]
    assert shapes[0] == shapes[1]


BAD = {
    "empty": (b"", "it does not begin with GGUF"),
    "text": (b"model: tiny", "it does not begin with GGUF"),
    "header alone": (b"GGUF", "the file is truncated"),
    "truncated": (None, "the file is truncated"),
    "another version": (b"GGUF" + b"\xff" * 64, "it is of version 4,294,967,295"),
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_raises_and_leaves_nothing_in_the_cache(file: Path, tmp_path: Path, name: str, weights: bool):
    content, message = BAD[name]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[:-5000] if content is None else content)
    with pytest.raises(LoraError, match=message) as caught:
        unpack_gguf(bad, dtype=torch.float32, cache=tmp_path / "cache", info=no_output, weights=weights)
    assert "bad.gguf" in caught.value.message
    assert not [path for path in (tmp_path / "cache").glob("gguf/*") if not path.name.startswith(".lock-")]


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_packed_is_chosen_where_possible_and_reported(file: Path, monkeypatch: pytest.MonkeyPatch):
    messages: list[str] = []
    assert choose_packed("auto", file, device=CPU, info=messages.append) is False
    assert messages == ["tiny.Q8_0.gguf: dequantized, because transformers has no kernel for packed weights on the CPU"]
    not_possible = r"model\.gguf: packed is not possible: transformers has no kernel .* on the CPU"
    with pytest.raises(LoraError, match=not_possible) as caught:
        choose_packed("packed", file, device=CPU, info=no_output)
    assert caught.value.hint == "set model.gguf to auto or dequantized: the weights have the same values"
    assert choose_packed("dequantized", file, device=GPU, info=no_output) is False

    # On a GPU it depends on the package that downloads the kernel, and on the architecture.
    monkeypatch.setattr("lora_cli.model.gguf_base.find_spec", lambda package: None)
    with pytest.raises(LoraError, match="the package kernels, which downloads the kernel"):
        choose_packed("packed", file, device=GPU, info=no_output)
    monkeypatch.setattr("lora_cli.model.gguf_base.find_spec", lambda package: object())
    with pytest.raises(LoraError, match="transformers loads the architecture llama dequantized only"):
        choose_packed("packed", file, device=GPU, info=no_output)
    monkeypatch.setattr("lora_cli.model.gguf_base.is_gguf_arch_supported", lambda architecture: architecture == "llama")
    assert choose_packed("auto", file, device=GPU, info=messages.append) is True
    assert messages[-1] == "tiny.Q8_0.gguf: kept packed"


def packed_and_dequantized(ggml_type: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the tiny llama with its MLP in transformers' packed layers, and with the same weights dequantized."""
    models = zoo.make("llama"), zoo.make("llama")
    ggml = TYPES[ggml_type]
    for name, layer in list(models[0].named_modules()):
        if ".mlp." not in name or not isinstance(layer, torch.nn.Linear):
            continue
        blocks = gguf.quantize(layer.weight.numpy(), ggml)
        packed = GgufLinear(layer.in_features, layer.out_features, int(ggml))
        packed.weight.data = torch.tensor(blocks)
        models[0].set_submodule(name, packed)
        models[1].get_submodule(name).weight.data = torch.tensor(gguf.dequantize(blocks, ggml))
    return models


@pytest.mark.parametrize("tokens", [5, 40])  # below and above the limit of the kernel that has no backward pass
@pytest.mark.parametrize("ggml_type", ["Q8_0", "Q4_1"])
def test_gradients_pass_packed_layers_and_equal_those_on_dequantized_weights(ggml_type: str, tokens: int):
    """With transformers' fallback for the CPU; this project has never run packed layers on a GPU."""
    ids = torch.randint(3, zoo.VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    results = []
    for model in packed_and_dequantized(ggml_type):
        make_packed_layers_differentiable(model)
        spec = AdapterSpec(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "up_proj", "down_proj"])
        adapted = attach_adapter.attach(model, spec, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        results.append((loss.item(), gradients, adapted))
    (loss, gradients, adapted), (expected_loss, expected_gradients, _) = results
    assert isinstance(adapted.get_base_model().model.layers[0].mlp.up_proj, PackedLora)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert zoo.relative(gradient, expected_gradients[name]) < 1e-4, name


def test_an_adapter_on_packed_layers_is_allowed_saved_and_loaded(tmp_path: Path):
    prequantized.check_prequantized(Prequantized("gguf", None), AdapterSpec(method="lora"), None, path="x.gguf")
    packed, _ = packed_and_dequantized("Q8_0")
    make_packed_layers_differentiable(packed)
    adapted = attach_adapter.attach(packed, AdapterSpec(rank=4, target_modules=["q_proj", "up_proj"]), seed=0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.05
    save_adapter.save_adapter(adapted, tmp_path, base="x.gguf", revision=None)
    ids = torch.arange(3, 40)[None]
    difference = save_adapter.compare_reloaded(adapted, tmp_path, lambda model: model.eval()(ids).logits)
    assert difference == (0, 0)


def test_packed_experts_raise():
    model = zoo.make("llama")
    experts = GgufExperts(2, 64, 128, int(TYPES["Q8_0"]), int(TYPES["Q8_0"]), torch.nn.SiLU())
    model.set_submodule("model.layers.0.mlp", experts)
    with pytest.raises(LoraError, match=r"cannot train with packed experts \(model\.layers\.0\.mlp\)") as caught:
        make_packed_layers_differentiable(model)
    assert caught.value.hint == "write model: {gguf: dequantized}"
