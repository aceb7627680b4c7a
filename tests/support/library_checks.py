"""Checks of what lora_cli needs from private and undocumented names of libraries other than PEFT, on tiny objects.

Each check fails if a name is missing or behaves differently. `tests/laws/test_library_internals.py` lists the names.
"""

import inspect
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import datasets
import gguf
import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
import transformers
import xllamacpp
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.tasks import TaskManager
from onnx import numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import _python_dispatch, _pytree
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    conversion_mapping,
    core_model_loading,
    modeling_gguf_pytorch_utils,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.gguf import dequant
from transformers.integrations.gguf import utils as gguf_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon import modeling_falcon
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import chat_template_utils

from lora_cli.model.falcon_attention import FalconInterfaceAttention
from lora_cli.model.fused_mlp import GRADIENTS
from lora_cli.model.kernels import LIGER_LEFT_OUT
from lora_cli.model.library_errors import is_panic
from lora_cli.model.tokenizer_files import silent_panics
from tests.model import zoo

IDS = torch.arange(3, 15)[None]


def four_bit() -> Any:
    """Return a 4-bit layer with double quantization, [out, in] = [32, 64]."""
    return bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4").to("cpu")


# --- transformers ---


def attention_name() -> None:
    model = zoo.make("llama", attention="eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"


def attention_functions() -> None:
    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        calls.append((query.shape, key.shape, mask, options))
        return query.transpose(1, 2), None

    calls: list[Any] = []
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    ALL_ATTENTION_FUNCTIONS.register("test_attention", attention)
    try:
        assert "test_attention" in ALL_ATTENTION_FUNCTIONS.valid_keys()
        zoo.make("llama", attention="test_attention")(IDS, use_cache=False, row_plan="passed through")
    finally:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping["test_attention"]
    assert before.keys() == set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    query, key, mask, options = calls[0]
    assert (query, key, mask) == ((1, 4, 12, 16), (1, 2, 12, 16), None)
    assert options["row_plan"] == "passed through"
    assert options["scaling"] == 16**-0.5


def mask_functions() -> None:
    def mask(**options: Any) -> Any:
        masks.append(options)
        return sdpa_mask(**options)

    masks: list[dict[str, Any]] = []
    ALL_ATTENTION_FUNCTIONS.register("test_attention", sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register("test_attention", mask)
    padding = torch.ones_like(IDS)
    padding[:, -2:] = 0
    try:
        zoo.make("llama", attention="test_attention")(IDS, attention_mask=padding, use_cache=False)
    finally:
        del type(ALL_ATTENTION_FUNCTIONS)._global_mapping["test_attention"]
        del type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping["test_attention"]
    (options,) = masks
    assert options["allow_is_causal_skip"] is True
    assert torch.equal(options["attention_mask"], padding.bool())
    # Without a mask of padding, a causal mask is not made; with one that is not skipped, it is.
    assert sdpa_mask(**{**options, "attention_mask": None}) is None
    made = sdpa_mask(**{**options, "allow_is_causal_skip": False})
    assert torch.equal(made[0, 0], torch.ones(12, 12).tril().bool() & padding[0].bool())


def task_mappings() -> None:
    for task, model_type, class_name in (
        ("CAUSAL_LM", "llama", "LlamaForCausalLM"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "t5", "T5ForConditionalGeneration"),
        ("SEQUENCE_CLASSIFICATION", "bert", "BertForSequenceClassification"),
        ("TOKEN_CLASSIFICATION", "bert", "BertForTokenClassification"),
    ):
        mapping = getattr(transformers, f"MODEL_FOR_{task}_MAPPING")
        config_class = type(transformers.AutoConfig.for_model(model_type))
        assert config_class in mapping
        assert mapping[config_class].__name__ == class_name
        assert transformers.CLIPConfig not in mapping


def stateful_models() -> None:
    assert zoo.make("mamba")._is_stateful is True
    assert zoo.make("llama")._is_stateful is False


def mixtral() -> Any:
    config = transformers.AutoConfig.for_model("mixtral", **zoo.COMMON, num_local_experts=2)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def experts_models() -> None:
    assert mixtral()._can_set_experts_implementation() is True
    assert zoo.make("llama")._can_set_experts_implementation() is False


def weight_conversion() -> None:
    model, keys = mixtral(), [f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight" for n in (10, 2)]
    name = "model.layers.0.mlp.experts.down_proj"
    rules = conversion_mapping.get_model_conversion_mapping(model)
    assert all(isinstance(rule, core_model_loading.WeightTransform) for rule in rules)
    converters = [rule for rule in rules if isinstance(rule, transformers.WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
    assert sorted(keys, key=core_model_loading.dot_natural_key) == keys[::-1]
    key = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    known = model.state_dict()
    found, pattern = core_model_loading.rename_source_key(key, renamings, converters, model.base_model_prefix, known)
    assert found == name
    rule = next(rule for rule in converters if pattern in rule.source_patterns)
    for number in range(2):
        rule.add_tensor(name, key.replace(".0.w2", f".{number}.w2"), pattern, torch.full((64, 128), float(number)))
    (value,) = rule.convert(name, model=model, config=model.config).values()
    joined = value[0] if isinstance(value, list) else value
    assert joined.shape == (2, 64, 128)
    model._weight_conversions = []  # no rules: nothing is split
    assert core_model_loading.revert_weight_conversion(model, {name: joined}).keys() == {name}
    model._weight_conversions = conversion_mapping.get_model_conversion_mapping(model)
    split = core_model_loading.revert_weight_conversion(model, {name: joined})
    assert {key: float(tensor.mean()) for key, tensor in split.items()} == {key: 0, key.replace(".0.w2", ".1.w2"): 1}


def packed_linear() -> None:
    weight = torch.randn(32, 64)
    blocks = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    layer = gguf_utils.GgufLinear(64, 32, int(gguf.GGMLQuantizationType.Q8_0))
    layer.weight.data = torch.tensor(blocks)
    assert (layer.in_features, layer.out_features, layer.bias, layer.input_permutation) == (64, 32, None, None)
    x = torch.randn(3, 64, requires_grad=True)
    product = layer._unpack_matmul(x)
    assert (
        zoo.relative(
            product.detach(), x.detach() @ torch.tensor(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)).T
        )
        < 1e-5
    )
    product.sum().backward()
    assert x.grad is not None
    assert issubclass(gguf_utils.GgufExperts, nn.Module)
    assert layer.ggml_type == int(gguf.GGMLQuantizationType.Q8_0)
    values = torch.tensor(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(dequant.dequantize(layer.weight, layer.ggml_type).view(values.shape), values)
    embedding = gguf_utils.GgufEmbedding(32, 64, layer.ggml_type)
    assert (embedding.weight.shape, embedding.ggml_type) == (layer.weight.shape, layer.ggml_type)


def gguf_header() -> None:
    assert gguf_utils.is_gguf_arch_supported("lfm2")
    assert not gguf_utils.is_gguf_arch_supported("no-such-architecture")


def gguf_progress_bar() -> None:
    assert list(modeling_gguf_pytorch_utils.tqdm([1, 2], disable=True)) == [1, 2]
    assert "tqdm" in modeling_gguf_pytorch_utils.load_gguf_checkpoint.__code__.co_names


def quantizer() -> None:
    for bits, kind in ((4, "Linear4bit"), (8, "Linear8bitLt")):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(zoo.make("llama").config)
        found = AutoHfQuantizer.from_config(transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
        found.preprocess_model(model=model, device_map={"": "cpu"})
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == kind


def left_out() -> None:
    """The head is left out of quantization, and what is left out by name is not converted."""
    names = get_keys_to_not_convert(zoo.make("llama"))
    assert "lm_head" in names
    assert not should_convert_module("lm_head", names)
    assert should_convert_module("model.layers.0.self_attn.q_proj", names)


def loaded_model() -> None:
    with TemporaryDirectory() as folder:
        zoo.make("llama").save_pretrained(folder)
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        options = {"output_loading_info": True, "num_labels": 3}
        model, info = load(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), **options)
        assert model.hf_quantizer is not None
        assert model.is_loaded_in_8bit is True
        assert list(info["missing_keys"]) == ["score.weight"]
        assert list(info["unexpected_keys"]) == ["lm_head.weight"]
        model.save_pretrained(folder)
        model, info = load(folder, ignore_mismatched_sizes=True, **{**options, "num_labels": 5})
        assert [entry[0] for entry in info["mismatched_keys"]] == ["score.weight"]
        del model
        assert getattr(zoo.make("llama"), "hf_quantizer", None) is None


def missing_file() -> None:
    """A file that a model folder lacks is an OSError; one that it has is found."""
    from transformers.utils import cached_file

    with TemporaryDirectory() as folder:
        (Path(folder) / "here.json").write_text("{}")
        assert cached_file(folder, "here.json", revision=None) == str(Path(folder) / "here.json")
        try:
            cached_file(folder, "missing.json", revision=None)
        except OSError:
            return
        raise AssertionError("a missing file is not an OSError")


def rendered_template() -> None:
    source = "{% for m in messages %}{{ eos }}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    texts, blocks = chat_template_utils.render_jinja_template(
        conversations=[[{"role": "user", "content": "ab"}]], tools=None, chat_template=source,
        return_assistant_tokens_mask=True, add_generation_prompt=False, eos="!",
    )  # fmt: skip
    assert (texts, [[tuple(block) for block in each] for each in blocks]) == (["!ab"], [[(1, 3)]])


def cache_layer() -> None:
    key = torch.zeros(1, 2, 3, 16)
    layer = DynamicLayer()
    layer.lazy_initialization(key, key)
    layer.keys, layer.values = key, key
    cache = DynamicCache()
    cache.layers.append(layer)
    cache.update(key, key, 0)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (1, 2, 6, 16)
    assert all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=zoo.make("llama").config).layers)


# --- bitsandbytes, datasets, torch and others ---


def four_bit_layer() -> None:
    layer = four_bit()
    assert layer.support_avx512bf16_for_cpu in (True, False)
    assert "support_avx512bf16_for_cpu" in type(layer).forward.__code__.co_names
    assert layer.compute_dtype == torch.bfloat16
    assert (layer.weight.compress_statistics, layer.weight.quant_type) == (True, "nf4")
    state = layer.weight.quant_state
    assert (state.nested, state.shape, len(state.code)) == (True, (32, 64), 16)
    assert (state.absmax.numel(), state.state2.absmax.numel(), state.offset.numel()) == (32, 1, 1)
    assert len(state.state2.code) == 256
    tensors = state.as_dict(packed=True)
    assert "quant_state.bitsandbytes__nf4" in tensors
    loaded = bnbf.QuantState.from_dict(dict(tensors), device=torch.device("cpu"))
    assert torch.equal(bnbf.dequantize_4bit(layer.weight.data, loaded), bnbf.dequantize_4bit(layer.weight.data, state))


def int8_functions() -> None:
    weight = torch.randn(8, 16, dtype=torch.float16)
    codes, scales, _ = bnbf.int8_vectorwise_quant(weight)
    assert (codes.dtype, scales.shape) == (torch.int8, (8,))
    assert zoo.relative(bnbf.int8_vectorwise_dequant(codes, scales), weight.float()) < 0.01
    with TemporaryDirectory() as folder:
        zoo.make("llama").save_pretrained(folder)
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.weight.SCB.shape == (128,)
    weight[2, 5] = 9.0  # an outlier: its column is left out
    codes, scales, outliers = bnbf.int8_vectorwise_quant(weight.clone(), threshold=6.0)
    assert outliers.tolist() == [5]
    assert not codes[:, 5].any()
    assert float(scales[2]) < 6


def panic() -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with silent_panics(), pytest.raises(BaseException, match="retry-limit") as caught:
        core.encode("a" * 1000)
    assert is_panic(caught.value)
    assert not isinstance(caught.value, Exception)


def optimizer_state() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = bnb.optim.AdamW8bit([parameter])
    optimizer.check_overrides()
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state = optimizer.state[parameter]
    assert {key for key in state if not key.startswith("qmap")} == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert (state["step"], state["state1"].dtype) == (0, torch.uint8)


def fingerprint() -> None:
    first, same, changed = (datasets.Dataset.from_dict({"a": [n]})._fingerprint for n in (1, 1, 2))
    assert first == same != changed


def module_dictionaries() -> None:
    module = nn.Linear(2, 3)
    module._parameters["weight"] = nn.Parameter(torch.ones(3, 2))
    assert torch.equal(module.weight, torch.ones(3, 2))
    assert list(module._parameters) == ["weight", "bias"]
    parametrize.register_parametrization(module, "weight", nn.Identity(), unsafe=True)
    assert module._modules["parametrizations"]["weight"].original is module.parametrizations.weight.original
    assert "parametrizations.weight.original" in module.state_dict()


def compiled_layer() -> None:
    """A layer is compiled in place and plain again without its compiled call; a backend that fails raises."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise ValueError("no compiler")

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cos() + 1

    layer, x = Layer(), torch.ones(1, 3)
    layer.compile(backend=backend)
    assert layer._compiled_call_impl is not None
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="no compiler"):
        layer(x)
    layer._compiled_call_impl = None
    assert layer(x).shape == (1, 3)


def dispatch_mode() -> None:
    class Seen(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Seen():
        torch.ones(2).rsqrt()
        nn.LayerNorm(2)(torch.ones(1, 2))
    assert "rsqrt" in names
    assert "native_layer_norm" in names


def group_timeout() -> None:
    """The timeout of a process group can be changed; `tests/training/test_process_group.py` shows that it is kept."""
    signature = inspect.signature(torch.distributed.distributed_c10d._set_pg_timeout)
    assert "timeout" in signature.parameters
    assert signature.parameters["group"].default is None


def weights_kept_in_fp32() -> None:
    """Models name the weights that stay in fp32; `tests/laws/test_sharding.py` compares the dtypes of all families."""
    model = zoo.make("llama")
    model._keep_in_fp32_modules_strict = {"norm"}
    assert model._get_dtype_plan(torch.bfloat16) == {"norm": torch.float32}
    assert model._get_dtype_plan(torch.float32) == {}


def sharded_layer() -> None:
    """A layer's shards can be set before its first pass, and are whole in a pass; `tests/laws/test_sharding.py` too."""
    with TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
            in_host = torch.distributed.fsdp.CPUOffloadPolicy(pin_memory=False)
            for policy in (torch.distributed.fsdp.OffloadPolicy(), in_host):
                layer = torch.nn.Linear(4, 3, bias=False, device="meta").requires_grad_(False)
                torch.distributed.fsdp.fully_shard(layer, mesh=mesh, ignored_params=set(), offload_policy=policy)
                assert isinstance(layer, torch.distributed.fsdp.FSDPModule)
                placements, ones = [torch.distributed.tensor.Shard(0)], torch.ones(3, 4)
                values = torch.distributed.tensor.DTensor.from_local(ones, mesh, placements, run_check=False)
                layer.weight = torch.nn.Parameter(values.cpu(), requires_grad=False)
                assert torch.equal(layer(torch.ones(1, 4)), torch.full((1, 3), 4.0))
                layer.reshard()
                assert isinstance(layer.weight, torch.distributed.tensor.DTensor)
                layer.unshard()
                assert not isinstance(layer.weight, torch.distributed.tensor.DTensor)
        finally:
            torch.distributed.destroy_process_group()


def collectives_are_counted() -> None:
    """The count of a group rises with each collective that this process begins, in any of its threads."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        group: Any = torch.distributed.group.WORLD
        before = group._get_sequence_number_for_group()
        torch.distributed.all_reduce(torch.ones(1))
        torch.distributed.broadcast(torch.ones(1), 0)
        assert group._get_sequence_number_for_group() == before + 2
    finally:
        torch.distributed.destroy_process_group()


def shared_store() -> None:
    """Clients of a store see each other's keys, and those of a prefix only with it."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    part = torch.distributed.PrefixStore("a", client)
    part.set("key", "value")
    assert (server.check(["key"]), server.check(["a/key"]), part.get("key")) == (False, True, b"value")
    assert (part.add("count", 1), part.add("count", 1)) == (1, 2)
    assert part.compare_set("first", "", "mine") == b"mine"
    assert part.compare_set("first", "", "other") == b"mine"


def errors_of_a_store() -> None:
    """The error of a port in use is a DistError with the name of its number; NCCL's is one too."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(torch.distributed.DistError, match="EADDRINUSE"):
        torch.distributed.TCPStore("127.0.0.1", server.port, is_master=True, wait_for_workers=False)
    kinds = (torch.distributed.DistBackendError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    assert all(issubclass(kind, torch.distributed.DistError) for kind in kinds)
    assert issubclass(torch.distributed.DistError, RuntimeError)


def deterministic_switch() -> None:
    assert isinstance(torch.utils.deterministic.fill_uninitialized_memory, bool)


def liger_functions() -> None:
    """The table has functions that take what `model/kernels.py` leaves out, and the model."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, monkey_patch

    parameters = inspect.signature(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]).parameters
    assert {*LIGER_LEFT_OUT, "model"} <= parameters.keys()
    assert "model" in inspect.signature(_apply_liger_kernel_to_instance).parameters


def liger_gates() -> None:
    """The kernels of gated MLPs take gate and up, and the gradient of their product last; results: see test_kernels."""
    from liger_kernel.ops import geglu, swiglu

    for forward, backward in (
        (swiglu.swiglu_forward, swiglu.swiglu_backward),
        (geglu.geglu_forward, geglu.geglu_backward),
    ):
        assert list(inspect.signature(forward).parameters)[:2] == ["a", "b"]
        assert list(inspect.signature(backward).parameters)[:3] == ["a", "b", "dc"]


def activations() -> None:
    """Each has the derivative that the fused MLP computes."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    for kind, gradient in GRADIENTS.items():
        (expected,) = torch.autograd.grad(kind()(x).sum(), x)
        assert torch.allclose(gradient(torch.ones_like(x), x.detach()), expected, atol=1e-6), kind


def hooks_of_a_module() -> None:
    """The dictionaries of a module hold its hooks."""
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        layer = torch.nn.Linear(2, 2)
        getattr(layer, f"register_{kind}_hook")(lambda *args: None)
        dictionary = f"_{kind.removeprefix('full_')}_hooks"
        assert len(getattr(layer, dictionary)) == 1, kind


def falcon_linear() -> None:
    """It multiplies with its weight and adds its bias."""
    layer, x = modeling_falcon.FalconLinear(3, 2), torch.randn(4, 3)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)


def falcon_layers() -> None:
    """Its attention has the attributes and arguments that our subclass reads, and keeps its implementation."""
    config = AutoConfig.for_model(
        "falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, multi_query=True
    )
    model = AutoModelForCausalLM.from_config(config)
    layer = model.transformer.h[0].self_attention
    assert type(layer) is modeling_falcon.FalconAttention
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.new_decoder_architecture) == (4, 1, 8, False)
    query, key, value = layer._split_heads(layer.query_key_value(torch.ones(1, 3, 32)))
    assert (query.shape, key.shape, value.shape) == ((1, 3, 4, 8), (1, 3, 1, 8), (1, 3, 1, 8))
    assert not model._can_set_attn_implementation()
    ours = inspect.signature(FalconInterfaceAttention.forward).parameters.keys()
    assert ours == inspect.signature(modeling_falcon.FalconAttention.forward).parameters.keys()


class _Wrapper(torch.Tensor):
    """A tensor without memory whose values are twos."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        twos = lambda each: torch.full(each.shape, 2.0)  # noqa: E731
        args, kwargs = _pytree.tree_map_only(_Wrapper, twos, (args, kwargs or {}))
        return func(*args, **kwargs)


def tensor_subclass() -> None:
    wrapper: Any = torch.Tensor._make_wrapper_subclass(
        _Wrapper, (2, 3), dtype=torch.float32, device=torch.device("cpu")
    )
    parameter = nn.Parameter(wrapper, requires_grad=False)
    assert parameter is wrapper
    assert isinstance(parameter.data, nn.Parameter)
    assert type(torch.cat([parameter, parameter])) is torch.Tensor
    assert torch.equal(nn.functional.layer_norm(torch.ones(3), (3,)) + parameter[0] * 2, torch.full((3,), 4.0))


def softmax_backward() -> None:
    x, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    weights = torch.softmax(x, dim=-1)
    (expected,) = torch.autograd.grad(weights, x, grad)
    assert torch.allclose(torch._softmax_backward_data(grad, weights.detach(), -1, torch.float32), expected)


def launchers_store() -> None:
    """A worker does not make a store of its own, but connects to that of the launcher."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("key", "value")
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        found, rank, world_size = next(torch.distributed.rendezvous("env://"))
    assert (found.get("key"), rank, world_size) == (b"value", 0, 1)


def offline_switch() -> None:
    assert constants.ENDPOINT.startswith("http")
    with pytest.MonkeyPatch.context() as patch:
        for offline in (True, False):
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
            assert huggingface_hub.is_offline_mode() is offline
            assert transformers.utils.hub.is_offline_mode() is offline


def errors_of_http() -> None:
    client = type(huggingface_hub.get_session())(timeout=1, follow_redirects=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with client, pytest.raises(HfHubHTTPError.__bases__[0], match="refused"):
        client.head(f"http://127.0.0.1:{port}")


def harness_tasks() -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "own.yaml").write_text("task: own_task\ndataset_path: json\noutput_type: generate_until\n")
        assert "own_task" in TaskManager(include_path=folder, include_defaults=False).all_tasks


def llama_cpp_parameters() -> None:
    params = xllamacpp.CommonParams()
    for name in ("n_ctx", "n_parallel", "warmup", "fit_params", "use_jinja", "cache_type_k", "flash_attn_type"):
        assert hasattr(params, name), name
    params.model.path = "a.gguf"
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo("b.gguf", 1.0)]
    assert hasattr(xllamacpp.Server, "listening_address")


def onnx_names() -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "a")
    assert np.array_equal(numpy_helper.to_array(tensor, base_dir="."), np.zeros(3, np.float32))
    assert issubclass(onnx.checker.ValidationError, Exception)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "NoSuchFile"):
        assert issubclass(getattr(onnxruntime_pybind11_state, name), Exception), name
    assert issubclass(onnxruntime_pybind11_state.RuntimeException, Exception)
