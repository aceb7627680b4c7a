"""Law: merged files equal PEFT's merge, rounded once, for every model family, method and kind of change."""

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.merging import check_weights, compare_models, stream, streamed_models, verify
from lora_cli.merging.merge_tensors import MergedTensor
from lora_cli.model import attach_adapter, empty_base, safetensors_io, save_adapter
from lora_cli.model.adapter_config import LORA_FIELDS
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.fake_quantize import quantize_dequantize, quantized_weights
from lora_cli.model.safetensors_io import TensorInfo
from lora_cli.model.saved_adapter import SavedAdapter
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.schema import QuantizationSpec
from lora_cli.recipe.tasks import TaskName
from tests.model import families, zoo
from tests.model.families import FAMILIES, Family
from tests.support import checkpoints
from tests.support.merged_in_memory import differences, merged_parameters

BIG = 1 << 30


def convert_to_bf16(folder: Path) -> None:
    """Convert the floating-point tensors of a checkpoint to bf16, the dtype of most checkpoints."""
    file = folder / "model.safetensors"
    tensors = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def randomize(model: PeftModel) -> None:
    """Change every trainable parameter, as training does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05


def merge(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    *,
    task: TaskName = "causal-lm",
    max_shard_size: int = BIG,
    dtype: torch.dtype | None = None,
    quantization: QuantizationSpec | None = None,
    **options: Any,
) -> tuple[stream.MergePlan, list[MergedTensor]]:
    """Merge like `lora merge`, without its checks before and its verification after."""
    model = empty_base.init_empty_weights(checkpoints.checkpoint(base_folder, task=task, **options).skeleton())
    tensors = safetensors_io.list_tensors(base_folder)
    mapping = CheckpointMapping(model, tensors)
    adapted = empty_base.attach_saved_adapter(model, open_adapter(adapter_folder), base="base")
    plan = stream.plan_merge(adapted, mapping, tensors, dtype=dtype, keep_unknown=not TASKS[task].is_classification)
    out.mkdir()
    transforms = {}
    if quantization is not None:
        names = quantized_weights(checkpoints.checkpoint(base_folder, task=task, **options).skeleton(), quantization)
        transforms = {
            name: quantize_dequantize(quantization, torch.float32, transposed=transposed)
            for name, transposed in names.items()
        }
    merged = stream.write_merged(plan, out, max_shard_size=max_shard_size, transforms=transforms)
    if plan.untied:
        model.config.tie_word_embeddings = False
    model.config.save_pretrained(out)
    return plan, merged


def assert_equals_up_to_rounding(
    out: Path, expected: dict[str, Tensor], plan: stream.MergePlan, load: Callable[[str], PreTrainedModel]
) -> None:
    assert list(differences(load(str(out)), expected, plan.dtypes())) == []


def assert_the_streamed_proof_is_that_of_loaded_models(
    saved: SavedAdapter, out: Path, *, adapted: PeftModel, merged: PreTrainedModel
) -> None:
    """The logits of streamed models are those of `adapted` and `merged`, in memory; a wrong weight is found."""
    task = saved.base.task
    batch = compare_models.random_probes(
        task, tokens=60, vocabulary=90, pad_id=0, start_id=0, end_id=2 if task == "seq-cls" else None
    )

    def logits(model: PeftModel | PreTrainedModel) -> Tensor:
        return compare_models.probe_logits(model.eval(), batch, task)

    with verify.open_streams() as streams:
        streamed = streamed_models.open_adapted(saved, {}, streams)
        reloaded = streamed_models.open_merged(saved, out, streams)
        assert zoo.relative(logits(streamed.model), logits(adapted)) < 1e-5
        assert zoo.relative(logits(reloaded.model), logits(merged)) < 1e-5
        if not TASKS[task].is_classification:
            with streamed.model.disable_adapter(), adapted.disable_adapter():
                assert zoo.relative(logits(streamed.model), logits(adapted)) < 1e-5
        assert list(check_weights.mismatches(streamed, reloaded, streams)) == []
        tensors = safetensors_io.list_tensors(out)
        key = random.Random(out.parts[-2]).choice(sorted(tensors))
        again = streamed_models.open_adapted(saved, {}, streams)
        with flipped_bit(tensors[key]):
            (mismatch,) = check_weights.mismatches(again, reloaded, streams)
        assert "differs from" in mismatch.found


def saved_adapter(folder: Path) -> SavedAdapter:
    """Return the adapter in `folder`/adapter with the causal LM in `folder`/base."""
    adapter = folder / "adapter"
    return SavedAdapter(open_adapter(adapter), checkpoints.checkpoint(folder / "base"))


@contextmanager
def flipped_bit(tensor: TensorInfo) -> Iterator[None]:
    """Flip a bit of the largest element of a tensor: the second to last one in 16 bits, a high one in fp32.

    In an element near 0, that bit is less than the error of a sum.
    """
    bits = 8 * tensor.dtype.itemsize
    with tensor.file.open("r+b") as file:
        file.seek(tensor.begin)
        stored = file.read(tensor.size)
        values = np.frombuffer(stored, f"<u{tensor.dtype.itemsize}").copy()
        values[(values & ((1 << (bits - 1)) - 1)).argmax()] ^= {32: 1 << 22, 16: 1 << 1}.get(bits, 1)
        file.seek(tensor.begin)
        file.write(values.tobytes())
        file.flush()
        yield
        file.seek(tensor.begin)
        file.write(stored)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Family]:
    yield FAMILIES[request.param]
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_the_merge_of_every_family_equals_pefts(family: Family, tmp_path: Path):
    folder = families.write(family, tmp_path / "base")
    convert_to_bf16(folder)
    loaded = families.load(family, folder)
    context = AdapterContext(task=family.task, heads=loaded.heads)
    model = attach_adapter.attach(loaded.model, zoo.spec_of(**family.adapter), seed=0, context=context)
    randomize(model)
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    labels = families.LABELS if TASKS[family.task].is_classification else None
    plan, merged = merge(folder, tmp_path / "adapter", tmp_path / "out", task=family.task, labels=labels)
    written = safetensors_io.list_tensors(tmp_path / "out")
    if not labels:  # the pooler of an encoder's checkpoint can be left out
        assert written.keys() == safetensors_io.list_tensors(folder).keys()
    again = PeftModel.from_pretrained(families.load(family, folder, seed=9).model, str(tmp_path / "adapter"))
    base = checkpoints.checkpoint(folder, task=family.task, labels=labels, pad_id=0)
    assert_the_streamed_proof_is_that_of_loaded_models(
        saved_adapter(tmp_path)._replace(base=base),
        tmp_path / "out",
        adapted=again,
        merged=families.load(family, tmp_path / "out").model,
    )
    expected = merged_parameters(again)
    assert_equals_up_to_rounding(tmp_path / "out", expected, plan, lambda path: families.load(family, Path(path)).model)
    adapted = attach_adapter.adapted_layers(model)
    names = {tensor.name for tensor in merged}
    assert all(name in names or f"{name}.weight" in names for name in adapted)
    assert all(0.9 < tensor.retained < 1.1 for tensor in merged)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "llama4"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["experts", "attention"])
def test_an_adapter_merged_into_dequantized_weights_equals_the_trained_4_bit_model(
    kind: str, targets: str | list[str], tmp_path: Path
):
    """Experts are stored one by one, or stacked; with an adapter on attention alone they are only quantized."""
    family = FAMILIES[kind]
    folder = families.write(family, tmp_path / "base")
    spec = QuantizationSpec.model_validate({"compute_dtype": "float32"})
    model = zoo.adapted(checkpoints.load(folder, quantization=spec), target_modules=targets)
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    merge(folder, tmp_path / "adapter", tmp_path / "out", quantization=spec)
    ids = torch.arange(2, 96)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert zoo.relative(load_causal_lm(str(tmp_path / "out")).eval()(ids).logits, expected) < 1e-5


def load_causal_lm(path: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", zoo.METHODS)
def test_the_merge_of_every_method_equals_pefts(method: str, tmp_path: Path):
    zoo.make("qwen2").save_pretrained(tmp_path / "base")
    convert_to_bf16(tmp_path / "base")
    model = zoo.adapted(load_causal_lm(str(tmp_path / "base")), method=method)
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    plan, _ = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = PeftModel.from_pretrained(load_causal_lm(str(tmp_path / "base")), str(tmp_path / "adapter"))
    assert_the_streamed_proof_is_that_of_loaded_models(
        saved_adapter(tmp_path), tmp_path / "out", adapted=again, merged=load_causal_lm(str(tmp_path / "out"))
    )
    assert_equals_up_to_rounding(tmp_path / "out", merged_parameters(again), plan, load_causal_lm)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r".*layers\.0\..*_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "LoRA with its own bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "a fully trained head": {"modules_to_save": ["lm_head"]},
    "fully trained embeddings and head": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 9, 90]},
    "tokens of embeddings and head": {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 7]}},
    "adapter that keeps the tie": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "full training that keeps the tie": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "excluded modules": {"exclude_modules": ["v_proj", "up_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    "a frozen B (MiCA)": {"init_lora_weights": "mica"},
    "orthogonal factors": {"init_lora_weights": "orthogonal"},
}
UNTIES = {
    "embeddings",
    "the head",
    "a fully trained head",
    "fully trained embeddings and head",
    "tokens of embeddings and head",
}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_merge_of_every_lora_option_equals_pefts(name: str, tied: bool, tmp_path: Path):
    """Plain transformers loads the merged files; a tie of embeddings and head is kept only if the adapter kept it."""
    if "keeps the tie" in name and not tied:
        return
    zoo.make("qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    convert_to_bf16(tmp_path / "base")
    options = {"target_modules": "all-linear", **OPTIONS[name]}
    model = get_peft_model(load_causal_lm(str(tmp_path / "base")), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    randomize(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.arange(2, 96)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    plan, _ = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    merged = load_causal_lm(str(tmp_path / "out"))
    assert_the_streamed_proof_is_that_of_loaded_models(
        saved_adapter(tmp_path), tmp_path / "out", adapted=model, merged=merged
    )
    with torch.no_grad():
        assert zoo.relative(merged.eval()(ids).logits, expected) < 1e-5
    assert bool(plan.untied) is (tied and name in UNTIES)
    is_tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert is_tied is (tied and name not in UNTIES)
    assert ("lm_head.weight" in safetensors_io.list_tensors(tmp_path / "out")) is (not tied or name in UNTIES)


def test_every_setting_of_lora_that_merging_honors_is_in_a_test():
    """Here, in the tests of all families (fan_in_fan_out: GPT-2), or without effect on a trained adapter."""
    no_effect = {
        "r", "lora_alpha", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "velora_config",
    }  # fmt: skip
    tested = {key for options in OPTIONS.values() for key in options} | {"fan_in_fan_out"}
    general = {field.name for field in dataclasses.fields(PeftConfig)}
    assert LORA_FIELDS - general - no_effect == tested


def test_conv1d_layers_are_merged_as_peft_does(tmp_path: Path):
    zoo.make("gpt2").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model = get_peft_model(load_causal_lm(str(tmp_path / "base")), config)
    randomize(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.arange(2, 96)[None]
    with torch.no_grad():
        assert zoo.relative(load_causal_lm(str(tmp_path / "out")).eval()(ids).logits, model.eval()(ids).logits) < 1e-5


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_of_the_adapter_where_the_base_has_none_is_refused(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], lora_bias=True)
    model = get_peft_model(load_causal_lm(str(tmp_path / "base")), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(LoraError, match=r"a bias for model.layers.0.self_attn.q_proj, which has none in the base"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_with_resized_embeddings_is_merged(tmp_path: Path):
    """PEFT then saves the full embeddings and head, which have more rows than those of the base."""
    zoo.make("llama").save_pretrained(tmp_path / "base")
    model = load_causal_lm(str(tmp_path / "base"))
    model.resize_token_embeddings(zoo.VOCABULARY + 7)
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    randomize(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    rows = empty_base.embedding_rows(
        open_adapter(tmp_path / "adapter"), checkpoints.checkpoint(tmp_path / "base").skeleton()
    )
    assert rows == zoo.VOCABULARY + 7
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", vocabulary=rows)
    ids = torch.arange(2, zoo.VOCABULARY + 7)[None]
    with torch.no_grad():
        assert zoo.relative(load_causal_lm(str(tmp_path / "out"))(ids).logits, adapted.eval()(ids).logits) < 1e-5


def test_shards_respect_the_maximum_size_and_contain_the_same_tensors(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model = zoo.adapted(load_causal_lm(str(tmp_path / "base")))
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "one")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "many", max_shard_size=100_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 110_000
    one, many = load_causal_lm(str(tmp_path / "one")).state_dict(), load_causal_lm(str(tmp_path / "many")).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    # Our reader returns the same values as the safetensors library.
    for name, info in safetensors_io.list_tensors(tmp_path / "many").items():
        with safetensors_io.ShardFiles(writable=False) as files:
            value = files.read_tensor(info)
        assert torch.equal(value, load_file(info.file)[name])


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base")
    model = zoo.adapted(load_causal_lm(str(tmp_path / "base")))
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if "lora_B" in name)[0, 0] = 3e38  # infinite times alpha / rank
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_that_needs_changed_base_weights_is_an_error(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(load_causal_lm(str(tmp_path / "base")), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(LoraError, match=r"PEFT changed the base weights .* \(init_lora_weights: pissa\)"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
