"""Going on from a saved adapter of each method gives its model, to the bit; what cannot be continued is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lora_cli.errors import LoraError
from lora_cli.model import attach_adapter, continue_adapter, save_adapter
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.adapter_files import open_adapter
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.load_adapter import load_adapter
from lora_cli.recipe.schema import AdapterSpec
from tests.model import zoo

CONTINUED = [method for method in zoo.METHODS if method not in ("adalora", "p-tuning")]
CONTEXT = AdapterContext(encode=lambda text: [3 + len(text)])


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    result: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return result


def save(model: PeftModel, folder: Path) -> None:
    folder.mkdir()
    save_adapter.save_adapter(model, folder, base="org/base", revision=None)


def go_on(base: Any, folder: Path, **section: Any) -> PeftModel:
    """Attach the adapter in `folder` for training, as `setup/training_model.py` does."""
    spec = AdapterSpec.model_validate({"from": str(folder), **section})
    source = open_adapter(folder)
    continue_adapter.check_source(spec, source)
    model = attach_adapter.attach(base, spec, seed=7, context=CONTEXT)
    tensors = continue_adapter.check_fits(model, source)
    continue_adapter.load_source_tensors(model, tensors)
    upcast_trainable_params(model)
    continue_adapter.load_exact_tensors(model, source, tensors)
    return model


def assert_continued(tmp_path: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    trained = zoo.adapted(zoo.make("llama", dtype=dtype), **options)
    upcast_trainable_params(trained)
    for p in trained.parameters():
        if p.requires_grad and dtype != torch.float32:  # values that the base's dtype does not have
            p.data += 1e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    save(trained, tmp_path / "a")
    loaded = load_adapter(zoo.make("llama", dtype=dtype), open_adapter(tmp_path / "a"), base="org/base")
    upcast_trainable_params(loaded, for_inference=True)
    section = {key: value for key, value in options.items() if key in ("trainable_tokens", "rank_pattern")}
    model = go_on(zoo.make("llama", dtype=dtype), tmp_path / "a", **section)
    # In bf16, a layer in training rounds at other places than one for inference.
    assert zoo.relative(logits(model).float(), logits(loaded).float()) <= (0 if dtype == torch.float32 else 3e-2)
    save(model, tmp_path / "b")
    first, again = (load_file(tmp_path / name / save_adapter.ADAPTER_WEIGHTS) for name in ("a", "b"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(p.requires_grad for p in model.parameters())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", CONTINUED)
def test_each_method_goes_on_with_the_saved_function(tmp_path: Path, method: str):
    assert_continued(tmp_path, method=method)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "lora_only", "exclude_modules": ["k_proj"], "layers": [1]},
        {"modules_to_save": ["lm_head"], "trainable_tokens": ["word"]},
        {"trainable_tokens": ["word"]},  # of embeddings and head, whose order in the file is another one
        {
            "rank_pattern": {"q_proj": 3, "down_proj": 2},
            "alpha_pattern": {"q_proj": 3.0},
            "target_modules": ["q_proj", "down_proj"],
        },
        {"target_modules": r".*\.(q|v)_proj"},
    ],
)
def test_keys_that_the_recipe_leaves_out_are_those_of_the_adapter(tmp_path: Path, options: dict[str, Any]):
    assert_continued(tmp_path, **options)


def test_fully_trained_modules_keep_their_fp32_values_on_a_bf16_base(tmp_path: Path):
    model = assert_continued(tmp_path, dtype=torch.bfloat16, modules_to_save=["lm_head"])
    (head,) = [p for name, p in model.named_parameters() if p.requires_grad and "lm_head" in name]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("adalora", "is adalora, which cannot be trained on: its ranks were pruned"),
        ("p-tuning", "is p tuning, which cannot be trained on: its file has the embeddings"),
    ],
)
def test_methods_that_cannot_go_on_are_refused_by_name(tmp_path: Path, method: str, reason: str):
    save(zoo.attached(zoo.make("llama"), method=method), tmp_path / "a")
    with pytest.raises(LoraError) as caught:
        go_on(zoo.make("llama"), tmp_path / "a")
    assert reason in caught.value.message


def test_patterns_of_integers_as_peft_writes_them_are_those_of_the_recipe(tmp_path: Path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        alpha_pattern={"v_proj": 2, "q_proj": 3},
        task_type="CAUSAL_LM",
    )
    get_peft_model(zoo.make("llama"), config).save_pretrained(str(tmp_path / "a"))
    go_on(zoo.make("llama"), tmp_path / "a")
    go_on(zoo.make("llama"), tmp_path / "a", alpha_pattern={"q_proj": 3, "v_proj": 2})


def test_trained_tokens_in_another_order_are_refused(tmp_path: Path):
    options = {"tie_word_embeddings": True}
    save(zoo.adapted(zoo.make("llama", **options), trainable_tokens=["word", "two"]), tmp_path / "a")
    with pytest.raises(LoraError, match=r"trained token ids of .*a are \d+, \d+, of this recipe \d+, \d+"):
        go_on(zoo.make("llama", **options), tmp_path / "a", trainable_tokens=["two", "word"])


def test_another_shape_of_the_base_is_refused(tmp_path: Path):
    save(zoo.adapted(zoo.make("llama")), tmp_path / "a")
    with pytest.raises(LoraError, match=r"lora_A.weight of .*a is 4 x 64, on this base it is 4 x 32"):
        go_on(zoo.make("llama", hidden_size=32), tmp_path / "a")


def test_pissa_of_peft_is_refused_because_it_changed_its_base(tmp_path: Path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_2")
    get_peft_model(zoo.make("llama"), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(LoraError, match=r"PEFT changed the base weights .*init_lora_weights: pissa_niter_2"):
        go_on(zoo.make("llama"), tmp_path / "a")
