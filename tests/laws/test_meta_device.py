"""On a device that is not the CPU, nothing of a run stays on the CPU, and the host waits for it once a step and once
an evaluation, however many layers, rows and batches there are.

The meta device plays the part of the GPU (`tests/support/meta_device.py`); kernels of GPUs are eager equals.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.data.batches import BatchPlan
from lora_cli.evaluation.answers import Prompt, generate_answers
from lora_cli.evaluation.generation import generate
from lora_cli.evaluation.likelihood import measure_likelihood, measure_row_likelihoods
from lora_cli.evaluation.predict import predict
from lora_cli.model import adalora, lora_product, varlen_attention
from lora_cli.model.adapter_context import AdapterContext
from lora_cli.model.fp32_weights import upcast_trainable_params
from lora_cli.model.loss import LossFunction
from lora_cli.model.padded_attention import PADDED_ATTENTION
from lora_cli.model.save_adapter import save_adapter
from lora_cli.recipe.methods import METHOD_FACTS, MethodName
from lora_cli.recipe.schema import GenerationSpec
from lora_cli.recipe.training_section import TrainingSpec
from lora_cli.training import optimizer as optimizers
from lora_cli.training.checkpoint import load_checkpoint, save_checkpoint
from lora_cli.training.checkpoint_folders import newest_checkpoint
from lora_cli.training.loop import fit
from tests.inputs.tiny_tokenizers import CHATML, build
from tests.model import families, zoo
from tests.support.meta_device import META, GpuPart

pytestmark = pytest.mark.slow
# One process on the device.
ACCELERATOR: Any = SimpleNamespace(
    num_processes=1, process_index=0, device=META, reduce=lambda value, reduction: value, is_main_process=True
)
TOKENIZER = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
PROMPTS = ([3, 4, 5], [6, 7, 8, 9, 10])


def mixing_kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *_: Any, **options: Any) -> Tensor:
    """Use all arguments, as torch's variable-length attention does, without reading the borders on the host."""
    assert (starts.device, starts.dtype) == (query.device, torch.int32)
    mixed = (key + value).mean(dim=1, keepdim=True) + starts.float().mean().to(query.dtype)
    return query * options["scale"] + mixed


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "varlen_attn", mixing_kernel)
    # There is no generator of meta tensors.
    monkeypatch.setattr(lora_product.SeededMask, "draw", lambda mask, x: torch.empty_like(x, dtype=torch.bool))
    own = torch.optim.AdamW
    # The fused kernel has no form for meta tensors; the one for lists of tensors has as few launches.
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: own(groups, foreach=True, **options))


def make(*, layers: int = 2, family: str = "llama", method: MethodName = "lora", **options: Any) -> Any:
    """Return an adapted model on the meta device, in bf16, prepared for training as a run does."""
    model = zoo.make(family, dtype=torch.bfloat16, num_hidden_layers=layers)
    facts = METHOD_FACTS[method]
    dropout = {"dropout": 0.1} if "dropout" in facts.options else {}
    adapted = zoo.adapted(model, method=method, **dropout, **options)
    upcast_trainable_params(adapted)
    adapted.to(META)
    model.set_attn_implementation(varlen_attention.VARLEN_ATTENTION if facts.supports_packing else PADDED_ATTENTION)
    return adapted


def plan_of(*, rows: int = 6, batches_per_step: int = 1, packing: bool = True) -> BatchPlan:
    size = 24 if packing else 2
    lengths = [12, 10] * (rows // 2)
    return BatchPlan(zoo.rows_of(lengths), packing=packing, size=size, batches_per_step=batches_per_step, seed=0)


def steps(model: Any, plan: BatchPlan, *, total: int = 2, **options: Any) -> Iterator[Any]:
    of_fit = {key: options.pop(key) for key in ("task", "rank_allocator") if key in options}
    spec = TrainingSpec(**{"warmup": 0, "schedule": "constant", **options})
    optimizer = optimizers.make_optimizer(model, spec)
    return fit(model, plan, spec=spec, optimizer=optimizer, accelerator=ACCELERATOR, total=total, **of_fit)


def waits_of_two_steps(model: Any, *, rows: int = 6, batches: int = 1, **options: Any) -> Counter[str]:
    """Return the waits of the second and the third step: the first one finds out what the head of the model is."""
    with GpuPart() as part:
        taken = steps(model, plan_of(rows=rows, batches_per_step=batches), total=3, **options)
        next(taken)
        part.clear()
        assert [step.number for step in taken] == [2, 3]
    assert not part.slow_copies, part.slow_places
    return part.waits


def test_a_step_waits_once_however_many_layers_rows_and_batches_it_has():
    small = waits_of_two_steps(make())
    large = waits_of_two_steps(make(layers=4), rows=12, batches=3)
    assert small == large
    assert list(small.values()) == [2], small
    assert next(iter(small)).startswith("loop.py: summed, norm = "), small


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_alpha": 5.0},
        {"label_smoothing": 0.1},
        {"max_grad_norm": None},
        {"on_spike": "skip"},
        {"schedule": "cosine", "warmup": 1},
    ],
)
def test_options_of_training_do_not_wait(options: dict[str, Any]):
    assert sum(waits_of_two_steps(make(), **options).values()) == 2


@pytest.mark.parametrize("family", ["granite", "cohere", "qwen3", "mistral", "gpt-neox"])
def test_families_and_heads_do_not_wait(family: str):
    assert sum(waits_of_two_steps(make(family=family)).values()) == 2


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"freeze_a": True},
    ],
)
def test_adapters_do_not_wait(adapter: dict[str, Any]):
    assert sum(waits_of_two_steps(make(**adapter)).values()) == 2


def test_recomputed_layers_do_not_wait():
    model = make()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1)
    model.get_base_model().enable_input_require_grads()
    assert sum(waits_of_two_steps(model).values()) == 2


METHODS = [
    method for method in zoo.METHODS if method not in ("lora", "rslora", "lora+", "olora", "corda", "eva")
]  # the layers of these are those of LoRA and of PiSSA


@pytest.mark.parametrize("method", METHODS)
def test_methods_wait_once_a_step_and_an_evaluation_and_generate_as_the_base_does(method: MethodName):
    """One layer has seven adapters, and each phase several batches: a wait in each of them would be counted."""
    model, packing = make(layers=1, method=method), METHOD_FACTS[method].supports_packing
    plan = plan_of(rows=8, batches_per_step=2, packing=packing)
    allocator = adalora.rank_allocator(model)
    waits, copies = {}, {}
    with GpuPart() as part:
        taken = steps(model, plan, rank_allocator=allocator)
        next(taken)
        part.clear()
        next(taken)
        waits["step"], copies["step"] = part.waits.total(), part.slow_places.copy()
        loss_fn = LossFunction(model)
        for measure in (measure_likelihood, measure_row_likelihoods):
            part.clear()
            measure(loss_fn, plan)
            waits[measure.__name__], copies[measure.__name__] = part.waits.total(), part.slow_places.copy()
        model.get_base_model().set_attn_implementation("sdpa")
        base = zoo.make("llama", attention="sdpa", num_hidden_layers=1).to(META)
        for kind, each in {"answers": model, "answers of a base": base}.items():
            part.clear()
            generate(each, TOKENIZER, PROMPTS, spec=GenerationSpec(), max_new_tokens=3, stop=[])
            waits[kind] = part.waits.total()
    assert not any(copies.values()), copies
    of_ranks = 1 if allocator else 0  # AdaLoRA, where it masks components
    assert waits["step"] == 1 + of_ranks
    assert waits["measure_likelihood"] == waits["measure_row_likelihoods"] == 1
    assert waits["answers"] == waits["answers of a base"]


def test_adalora_waits_only_where_it_masks_other_components():
    model = make(layers=1, method="adalora")
    allocator = adalora.AdaLoraRankAllocator(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    waits = []
    with GpuPart() as part:
        for number in range(1, 9):
            part.clear()
            allocator.update_and_allocate(number)
            waits.append(part.waits.total())
    assert waits == [0, 1, 1, 1, 1, 0, 0, 0]
    assert not part.slow_copies, part.slow_places


@pytest.mark.parametrize("name", ["bert-tokens", "llama-classifier", "t5"])
def test_other_tasks_do_not_wait_for_their_batches(name: str, tmp_path: Path):
    family = families.FAMILIES[name]
    loaded = families.load(family, families.write(family, tmp_path))
    context = AdapterContext(task=family.task, heads=loaded.heads)
    model = zoo.attached(loaded.model.to(torch.bfloat16), context=context)
    upcast_trainable_params(model)
    loaded.model.set_attn_implementation(PADDED_ATTENTION)
    rows, collate = families.rows_of(family, [12, 30, 7, 21]), families.collate_of(family, packing=False)
    plan = BatchPlan(rows, packing=False, size=2, batches_per_step=2, seed=0, collate=collate)
    with GpuPart() as part:
        taken = steps(model.to(META), plan, task=family.task)
        next(taken)
        part.clear()
        next(taken)
        waits = [part.waits.total()]
        loss_fn = LossFunction(model, task=family.task)
        part.clear()
        measure_row_likelihoods(loss_fn, plan)
        waits.append(part.waits.total())
        if family.task in ("seq-cls", "token-cls"):
            part.clear()
            predict(loss_fn, plan, families.LABELS)
            waits.append(part.waits.total())
    assert set(waits) == {1}, part.waits
    assert not part.slow_copies, part.slow_places


@pytest.mark.parametrize("measure", [measure_likelihood, measure_row_likelihoods])
def test_an_evaluation_waits_once_for_all_batches(measure: Any):
    counts = []
    for rows in (4, 24):
        with GpuPart() as part:
            loss_fn = LossFunction(make())
            part.clear()
            measure(loss_fn, plan_of(rows=rows))
        assert not part.slow_copies, part.slow_places
        counts.append(sum(part.waits.values()))
    assert counts == [1, 1]


def test_an_answer_is_generated_on_the_device():
    model = zoo.adapted(zoo.make("llama", attention="sdpa", vocab_size=len(TOKENIZER)))
    prompts = [Prompt("rows:1", each, "Hi", ["Ho"], 1, [[3]]) for each in PROMPTS]
    with GpuPart():
        answers = generate_answers(model.to(META), TOKENIZER, prompts, spec=GenerationSpec(max_new_tokens=3), seed=0)
    assert len(answers) == 2


def test_a_checkpoint_is_saved_from_the_device_and_loaded_onto_it(tmp_path: Path):
    model = make()
    spec = TrainingSpec()
    with GpuPart() as part:
        optimizer = optimizers.make_optimizer(model, spec)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        save_checkpoint(
            tmp_path,
            model,
            optimizer,
            step=1,
            state={},
            keep=1,
            write_adapter=lambda folder: save_adapter(model, folder, base="org/base", revision=None),
        )
        assert part.waits
        saved = newest_checkpoint(tmp_path)
        assert saved
        other = make(seed=1)
        other_optimizer = optimizers.make_optimizer(other, spec)
        load_checkpoint(saved, other, other_optimizer)
        assert all(p.is_meta for p in other.parameters())
        other_optimizer.step()


def test_the_part_of_a_gpu_is_played_well():
    """What would raise on a GPU raises, and what would wait is counted: the tests above can fail."""
    on_gpu, on_cpu = torch.ones(3, device=META), torch.ones(3)
    with GpuPart() as part:
        with pytest.raises(RuntimeError, match="tensors on two devices: meta"):
            on_gpu + on_cpu
        assert (on_gpu * torch.tensor(2.0)).is_meta  # one number may come from the CPU
        assert not part.waits
        assert float(on_gpu[0]) == 1.0
        assert on_gpu.tolist() == [1.0, 1.0, 1.0]
        on_gpu.cpu()
        on_cpu.copy_(on_gpu)
        on_gpu.nonzero()
        assert sum(part.waits.values()) == 5, part.waits
        on_gpu[on_gpu > 0] = on_gpu[on_gpu > 0] + 1
        torch.linalg.solve(torch.ones(2, 2, device=META), torch.ones(2, 2, device=META))
        assert sum(part.waits.values()) == 8, part.waits
        assert not part.slow_copies
        on_gpu.copy_(on_cpu)
        on_cpu.to(META)
        on_cpu.to(META, non_blocking=True)  # from memory that is not page-locked
        torch.tensor([1.0, 2.0], device=META)
        on_gpu[torch.tensor([0, 1])]
        assert part.slow_copies == [(3,), (3,), (3,), (2,), (2,)]
        on_cpu.pin_memory().to(META, non_blocking=True)
        assert len(part.slow_copies) == 5
        assert sum(part.waits.values()) == 8
