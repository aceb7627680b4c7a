"""A GGUF file becomes a plain folder once, with the numbers its blocks stand for."""

import json
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lora_cli.data.encode import CausalLMEncoder
from lora_cli.errors import LoraError
from lora_cli.model import attach_adapter, base_model, prequantized, save_adapter
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
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import zoo

KINDS = {
    "F32": library.GGMLQuantizationType.F32,
    "Q8_0": library.GGMLQuantizationType.Q8_0,
    "Q4_1": library.GGMLQuantizationType.Q4_1,  # as the demo model has it
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
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
    """Rows of q and k in llama.cpp's order of rotary pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write the tiny llama as llama.cpp's converter would; returns the weights it stands for, by their names in it."""
    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    model = zoo.make("llama", vocab_size=len(tokenizer))
    writer = library.GGUFWriter(path, "llama")
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
    meant = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        *_, layer, part = ["", *name.removesuffix(".weight").removeprefix("model.layers.").split(".", 1)]
        its_name = NAMES.get(name) or f"blk.{layer}.{PARTS[part]}.weight"
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(part)
        stored = interleave(weight, heads) if heads else weight
        its_kind = KINDS[kind] if weight.ndim == 2 else KINDS["F32"]
        blocks = library.quantize(np.ascontiguousarray(stored), its_kind)
        writer.add_tensor(its_name, blocks, raw_dtype=its_kind)
        held = library.dequantize(blocks, its_kind)
        back = held.reshape(heads, -1, 2, held.shape[1]).swapaxes(1, 2).reshape(held.shape) if heads else held
        meant[name] = torch.tensor(back)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path, "Q8_0")
    return path


def silence(line: str) -> None:
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_what_its_blocks_stand_for(tmp_path: Path, kind: str, dtype: torch.dtype):
    path = tmp_path / f"tiny.{kind}.gguf"
    meant = write_gguf(path, kind)
    folder = unpack_gguf(path, dtype=dtype, cache=tmp_path, info=silence)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    found = model.state_dict()
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    ids = torch.arange(3, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)


def test_the_tokenizer_is_the_same(file: Path, tmp_path: Path):
    folder = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=silence)
    mine, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name),
    )
    for text in ("Hello, how are you?\n\n 42", "<|im_start|>user\nüñ<|im_end|>"):
        assert mine(text)["input_ids"] == theirs(text)["input_ids"]
        assert mine.decode(mine(text)["input_ids"]) == text
    assert mine.chat_template == CHATML
    assert mine.eos_token == "<|im_end|>"


def test_the_second_time_it_is_only_looked_up(file: Path, tmp_path: Path):
    said: list[str] = []
    first = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=said.append)
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=said.append) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == stamps
    assert len(said) == 1
    assert unpack_gguf(file, dtype=torch.bfloat16, cache=tmp_path, info=said.append) != first
    file.touch()  # perhaps other contents
    assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=said.append) != first


def test_who_comes_second_takes_what_is_there(file: Path, tmp_path: Path):
    """Another run begins later and is done before.

    Two processes do that; two threads would not do for a test: from_pretrained swaps tie_weights of its class for the
    time of a load, and two that overlap leave it swapped for good, for every test that comes after.
    """
    found: list[Path] = []

    def meanwhile(line: str) -> None:
        found.append(unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=silence))
        stamps.update({path: path.stat().st_ino for path in found[0].iterdir()})

    stamps: dict[Path, int] = {}
    found.append(unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=meanwhile))
    assert found[0] == found[1]
    assert {path: path.stat().st_ino for path in found[1].iterdir()} == stamps
    assert list((tmp_path / "gguf").iterdir()) == [found[0]]


def test_without_weights_config_and_tokenizer_are_the_same(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.model.gguf.AutoModelForCausalLM", None)
        light = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=said.append, weights=False)
        assert unpack_gguf(file, dtype=torch.bfloat16, cache=tmp_path, info=said.append, weights=False) == light
    assert said == [f"reading config and tokenizer of tiny.Q8_0.gguf, once; kept in {light}"]
    assert not list(light.glob("*.safetensors"))
    full = unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=silence)
    assert full != light
    assert unpack_gguf(file, dtype=torch.float32, cache=tmp_path, info=silence, weights=False) == full
    encoders = [CausalLMEncoder(DataSpec(train="x"), AutoTokenizer.from_pretrained(folder)) for folder in (light, full)]
    assert encoders[0].identity() == encoders[1].identity()
    shapes = [
        {name: p.shape for name, p in base_model.skeleton(AutoConfig.from_pretrained(folder)).named_parameters()}
        for folder in (light, full)
    ]
    assert shapes[0] == shapes[1]


BAD = {
    "empty": (b"", "not a GGUF file"),
    "text": (b"model: tiny", "not a GGUF file"),
    "header alone": (b"GGUF", "transformers cannot read this GGUF"),
    "cut short": (None, "the file is cut short"),
    "another version": (b"GGUF" + b"\xff" * 64, "transformers cannot read this GGUF"),
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_and_leaves_nothing(file: Path, tmp_path: Path, name: str, weights: bool):
    content, said = BAD[name]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[:-5000] if content is None else content)
    with pytest.raises(LoraError, match=said) as caught:
        unpack_gguf(bad, dtype=torch.float32, cache=tmp_path / "cache", info=silence, weights=weights)
    assert "bad.gguf" in caught.value.message
    assert not list((tmp_path / "cache").glob("gguf/*"))


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_packed_or_not_is_chosen_and_said(file: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    assert choose_packed("auto", file, device=CPU, info=said.append) is False
    assert said == ["tiny.Q8_0.gguf: dequantized, as transformers has no kernel for packed weights on the CPU"]
    with pytest.raises(LoraError, match=r"model\.gguf: packed, but transformers has no kernel .* on the CPU") as caught:
        choose_packed("packed", file, device=CPU, info=silence)
    assert caught.value.hint == "write auto or dequantized: the numbers are the same"
    assert choose_packed("dequantized", file, device=GPU, info=silence) is False

    # On a GPU it hangs on the package that fetches the kernel, and on the architecture.
    monkeypatch.setattr("lora_cli.model.gguf.find_spec", lambda package: None)
    with pytest.raises(LoraError, match="the package kernels, which fetches the kernel"):
        choose_packed("packed", file, device=GPU, info=silence)
    monkeypatch.setattr("lora_cli.model.gguf.find_spec", lambda package: object())
    with pytest.raises(LoraError, match="transformers loads the architecture llama dequantised only"):
        choose_packed("packed", file, device=GPU, info=silence)
    monkeypatch.setattr("lora_cli.model.gguf.is_gguf_arch_supported", lambda architecture: architecture == "llama")
    assert choose_packed("auto", file, device=GPU, info=said.append) is True
    assert said[-1] == "tiny.Q8_0.gguf: kept packed"


def packed_and_plain(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The tiny llama with its MLP in packed layers, as transformers makes them, and the same numbers unpacked."""
    models = zoo.make("llama"), zoo.make("llama")
    ggml = KINDS[kind]
    for name, layer in list(models[0].named_modules()):
        if ".mlp." not in name or not isinstance(layer, torch.nn.Linear):
            continue
        blocks = library.quantize(layer.weight.numpy(), ggml)
        packed = GgufLinear(layer.in_features, layer.out_features, int(ggml))
        packed.weight.data = torch.tensor(blocks)
        models[0].set_submodule(name, packed)
        models[1].get_submodule(name).weight.data = torch.tensor(library.dequantize(blocks, ggml))
    return models


@pytest.mark.parametrize("tokens", [5, 40])  # on both sides of what a GPU's kernel takes at once, without a gradient
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_gradients_pass_packed_layers_and_are_those_over_the_same_numbers(kind: str, tokens: int):
    """The layers as they run without a kernel; on a GPU they were never run by this project."""
    ids = torch.randint(3, zoo.VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
    results = []
    for model in packed_and_plain(kind):
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
    (loss, gradients, adapted), (expected, its_gradients, _) = results
    assert isinstance(adapted.get_base_model().model.layers[0].mlp.up_proj, PackedLora)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert zoo.relative(gradient, its_gradients[name]) < 1e-4, name


def test_an_adapter_over_packed_layers_is_allowed_saved_and_loaded(tmp_path: Path):
    prequantized.check_prequantized(Prequantized("gguf", None), AdapterSpec(method="lora"), None, path="x.gguf")
    packed, _ = packed_and_plain("Q8_0")
    make_packed_layers_differentiable(packed)
    adapted = attach_adapter.attach(packed, AdapterSpec(rank=4, target_modules=["q_proj", "up_proj"]), seed=0)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data += 0.05
    save_adapter.save_adapter(adapted, tmp_path, base="x.gguf", revision=None)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        apart = save_adapter.difference_when_loaded(
            adapted, tmp_path, lambda model: model.eval()(ids).logits, lambda model: None
        )
    assert apart == (0, 0)


def test_packed_experts_are_refused():
    model = zoo.make("llama")
    experts = GgufExperts(2, 64, 128, int(KINDS["Q8_0"]), int(KINDS["Q8_0"]), torch.nn.SiLU())
    model.set_submodule("model.layers.0.mlp", experts)
    with pytest.raises(LoraError, match=r"packed experts \(model\.layers\.0\.mlp\) cannot be trained over") as caught:
        make_packed_layers_differentiable(model)
    assert caught.value.hint == "write model: {gguf: dequantized}"
