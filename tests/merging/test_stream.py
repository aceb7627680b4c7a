"""Law: the files that merging writes are PEFT's merge, rounded once, for every family, method and kind of change."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_cli.errors import LoraError
from lora_cli.merging import compare_models, stream
from lora_cli.merging.deltas import merged_parameters
from lora_cli.merging.merge_tensors import MergedTensor
from lora_cli.model import attach_adapter, base_model, empty_base, safetensors_io, save_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.conversion import CheckpointMapping
from lora_cli.model.tasks import TASKS
from lora_cli.recipe.tasks import TaskName
from tests.model import families, zoo
from tests.model.families import FAMILIES, Family

BIG = 1 << 30


def in_bf16(folder: Path) -> None:
    """Store the floating tensors of a checkpoint in bf16, as most are."""
    file = folder / "model.safetensors"
    tensors = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def randomise(model: PeftModel) -> None:
    """As after some training, in every part of the adapter."""
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
    largest: int = BIG,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[stream.MergePlan, list[MergedTensor]]:
    """What `lora merge` does between opening and verifying."""
    config = base_model.load_config(base_model.ModelSource(str(base_folder), {}))
    model = empty_base.init_empty_weights(base_model.skeleton(config, task=task, **options))
    tensors = safetensors_io.list_tensors(base_folder)
    mapping = CheckpointMapping(model, tensors)
    adapted = empty_base.attach_saved_adapter(
        model, adapter_folder, PeftConfig.from_pretrained(str(adapter_folder)), base="base"
    )
    plan = stream.plan_merge(adapted, mapping, tensors, dtype=dtype, keep_unknown=not TASKS[task].classes)
    out.mkdir()
    folded = stream.write_merged(plan, out, largest=largest, transform={})
    saved = model.config
    if plan.untied:
        saved.tie_word_embeddings = False
    saved.save_pretrained(out)
    return plan, folded


def assert_is(
    out: Path, expected: dict[str, Tensor], plan: stream.MergePlan, load: Callable[[str], PreTrainedModel]
) -> None:
    assert list(compare_models.mismatches(load(str(out)), expected, plan.dtypes())) == []


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Family]:
    yield FAMILIES[request.param]
    shutil.rmtree(tmp_path)


def test_every_family(family: Family, tmp_path: Path):
    folder = families.write(family, tmp_path / "base")
    in_bf16(folder)
    loaded = families.load(family, folder)
    context = AdapterContext(task=family.task, heads=loaded.heads)
    model = attach_adapter.attach(loaded.model, zoo.spec_of(**family.adapter), seed=0, context=context)
    randomise(model)
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    labels = families.LABELS if TASKS[family.task].classes else None
    plan, folded = merge(folder, tmp_path / "adapter", tmp_path / "out", task=family.task, labels=labels)
    written = safetensors_io.list_tensors(tmp_path / "out")
    if not labels:  # of an encoder's checkpoint a pooler may be left out
        assert written.keys() == safetensors_io.list_tensors(folder).keys()
    again = PeftModel.from_pretrained(families.load(family, folder, seed=9).model, str(tmp_path / "adapter"))
    expected = merged_parameters(again)
    assert_is(tmp_path / "out", expected, plan, lambda path: families.load(family, Path(path)).model)
    adapted = attach_adapter.adapted_layers(model)
    assert {each.name.rpartition(".")[0] for each in folded} >= adapted.keys()
    assert all(0.9 < each.survived < 1.1 for each in folded)


def plain(path: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


@pytest.mark.parametrize("method", zoo.METHODS)
def test_every_method(method: str, tmp_path: Path):
    zoo.make("qwen2").save_pretrained(tmp_path / "base")
    in_bf16(tmp_path / "base")
    model = zoo.adapted(plain(str(tmp_path / "base")), method=method)
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    plan, _ = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = PeftModel.from_pretrained(plain(str(tmp_path / "base")), str(tmp_path / "adapter"))
    assert_is(tmp_path / "out", merged_parameters(again), plan, plain)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank and alpha patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r".*layers\.0\..*_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "LoRA with its own bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "a head trained whole": {"modules_to_save": ["lm_head"]},
    "both ends trained whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 9, 90]},
    "tokens of both ends": {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 7]}},
    "tied ends adapted alike": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "tied ends trained alike": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
UNTIES = {"embeddings", "the head", "a head trained whole", "both ends trained whole", "tokens of both ends"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_change(name: str, tied: bool, tmp_path: Path):
    """A tie that the adapter broke stays broken, one that it kept is kept: by plain transformers, from the files."""
    if "tied ends" in name and not tied:
        return
    zoo.make("qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    in_bf16(tmp_path / "base")
    options = {"target_modules": "all-linear", **OPTIONS[name]}
    model = get_peft_model(plain(str(tmp_path / "base")), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    randomise(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.arange(2, 96)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    plan, _ = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    merged = plain(str(tmp_path / "out"))
    with torch.no_grad():
        assert zoo.relative(merged.eval()(ids).logits, expected) < 1e-5
    assert bool(plan.untied) is (tied and name in UNTIES)
    ends = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (ends[0] is ends[1]) is (tied and name not in UNTIES)
    assert ("lm_head.weight" in safetensors_io.list_tensors(tmp_path / "out")) is (not tied or name in UNTIES)


def test_a_vocabulary_that_was_resized_by_another_tool(tmp_path: Path):
    """PEFT saves embeddings and head whole then: their rows are more than the base has."""
    zoo.make("llama").save_pretrained(tmp_path / "base")
    model = plain(str(tmp_path / "base"))
    model.resize_token_embeddings(zoo.VOCABULARY + 7)
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    randomise(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    config = base_model.load_config(base_model.ModelSource(str(tmp_path / "base"), {}))
    rows = empty_base.embedding_rows(tmp_path / "adapter", base_model.skeleton(config))
    assert rows == zoo.VOCABULARY + 7
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", vocabulary=rows)
    ids = torch.arange(2, zoo.VOCABULARY + 7)[None]
    with torch.no_grad():
        assert zoo.relative(plain(str(tmp_path / "out"))(ids).logits, adapted.eval()(ids).logits) < 1e-5


def test_files_are_no_larger_than_asked_and_hold_the_same(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model = zoo.adapted(plain(str(tmp_path / "base")))
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "one")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "many", largest=100_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 110_000
    one, many = plain(str(tmp_path / "one")).state_dict(), plain(str(tmp_path / "many")).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    # What the library reads is what this one does.
    for name, stored in safetensors_io.list_tensors(tmp_path / "many").items():
        with safetensors_io.ShardFiles(writable=False) as opened:
            value = stream.Pair(opened, opened).read(stored)
        assert torch.equal(value, load_file(stored.file)[name])


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base")
    model = zoo.adapted(plain(str(tmp_path / "base")))
    save_adapter.save_adapter(model, tmp_path / "adapter", base="x", revision=None)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if "lora_B" in name)[0, 0] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_that_wants_its_base_changed_first_is_refused(tmp_path: Path):
    zoo.make("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(plain(str(tmp_path / "base")), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(LoraError, match=r"base weights that PEFT changed .* \(init_lora_weights: pissa\)"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
