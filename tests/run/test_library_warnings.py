"""Each silenced warning still comes from its library with the text that the filter expects; others are still shown."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from bitsandbytes.backends.cpu import ops
from peft.tuners.boft import layer as boft_layer
from sklearn.metrics import matthews_corrcoef

from lora_cli.run.library_warnings import silence_gpu_kernel_advice, silence_library_warnings
from tests.model import families, zoo

IDS = torch.arange(3, 15)[None]
LOGGERS = (
    "bitsandbytes.autograd._functions",
    "transformers.modeling_utils",
    "bitsandbytes.backends.cpu.ops",
    "transformers.integrations.hub_kernels",
)


def lora(family: str = "llama", **options: Any) -> Any:
    return peft.get_peft_model(zoo.make(family), peft.LoraConfig(**options))


def load_a_pruned_adalora() -> None:
    options = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 3}
    model = peft.get_peft_model(zoo.make("llama"), peft.AdaLoraConfig(target_modules=["q_proj"], **options))
    for number in (1, 2):
        model(IDS, labels=IDS).loss.backward()
        model.base_model.update_and_allocate(number)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peft.PeftModel.from_pretrained(zoo.make("llama"), folder)


def attach_to_a_tied_head() -> None:
    model = zoo.make("llama", tie_word_embeddings=True)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def attach_boft() -> None:
    boft_layer._FBD_CUDA = None
    config = peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8)
    peft.get_peft_model(zoo.make("llama"), config)


WARNINGS: dict[str, tuple[Callable[[], object], type[Warning]]] = {
    "`is_gradient_checkpointing` is deprecated": (lambda: zoo.make("llama").is_gradient_checkpointing, FutureWarning),
    "fan_in_fan_out is set to False but the target module is `Conv1D`": (
        lambda: lora("gpt2", target_modules=["c_attn"]),
        UserWarning,
    ),
    "The following rank_pattern keys did not match any targeted": (load_a_pruned_adalora, RuntimeWarning),
    "lora with eva initialization used with low_cpu_mem_usage=False": (
        lambda: lora(target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()),
        UserWarning,
    ),
    "Failed to load the CUDA extension": (attach_boft, UserWarning),
    "Setting boft_n_butterfly_factor to 1": (attach_boft, UserWarning),
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter": (
        attach_to_a_tied_head,
        UserWarning,
    ),
    "A single label was found in 'y_true' and 'y_pred'": (lambda: matthews_corrcoef([1, 1], [1, 1]), UserWarning),
}


@pytest.fixture(autouse=True)
def _restore_filters() -> Iterator[None]:
    """`silence_library_warnings` is for a whole process; other tests in this one keep their filters."""
    before = {name: list(logging.getLogger(name).filters) for name in LOGGERS}
    with warnings.catch_warnings():
        yield
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


@contextmanager
def recorded() -> Iterator[list[str]]:
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield texts
    texts += [f"{warning.category.__name__}: {warning.message}" for warning in found]


@pytest.mark.parametrize("text", WARNINGS)
def test_the_library_still_gives_the_warning_and_it_is_silenced(text: str):
    provoke, category = WARNINGS[text]
    with recorded() as texts:
        provoke()
    assert any(each.startswith(f"{category.__name__}: {text}") for each in texts), f"no library warns: {text}"
    with recorded() as texts:
        silence_library_warnings()
        provoke()
    assert not any(text in each for each in texts)


def int8_product() -> None:
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    layer.eval()(torch.randn(2, 64))


def load_with_another_head() -> None:
    with TemporaryDirectory() as folder:
        zoo.make("llama").save_pretrained(folder)
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def convolve_without_kernel() -> None:
    warn_once = transformers.utils.logging.warning_once
    warn_once.cache_clear()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(families.config_of(families.FAMILIES["lfm2"]))
    model(IDS.to("meta"))


@pytest.mark.parametrize(
    ("logger", "text", "provoke"),
    [
        ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast", int8_product),
        ("transformers.modeling_utils", "LOAD REPORT", load_with_another_head),
        pytest.param(
            "transformers.integrations.hub_kernels",
            "is falling back to its reference PyTorch implementation",
            convolve_without_kernel,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels may be installed"),
        ),
    ],
)
def test_the_library_still_logs_the_line_and_it_is_silenced(logger: str, text: str, provoke: Callable[[], None]):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(logger).addHandler(handler)
    try:
        logging.getLogger(logger).filters.clear()
        provoke()
        assert any(text in line for line in lines), f"{logger} does not log: {text}"
        lines.clear()
        silence_library_warnings()
        silence_gpu_kernel_advice()
        provoke()
        logging.getLogger(logger).warning("another line")
        assert lines == ["another line"]
    finally:
        logging.getLogger(logger).removeHandler(handler)


def test_the_line_on_the_4_bit_kernel_still_has_its_text_and_logger():
    """Only its source is compared: bitsandbytes logs it once, at its import, on CPUs with AVX512-BF16."""
    assert ops.logger.name == "bitsandbytes.backends.cpu.ops"
    assert "Failed to load CPU gemm_4bit_forward from kernels-community" in inspect.getsource(ops)
    silence_library_warnings()
    (silence,) = ops.logger.filters
    lines = ("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "another line")
    passes = [bool(silence(ops.logger.makeRecord("", logging.WARNING, "", 0, line, (), None))) for line in lines]
    assert passes == [False, True]


def test_other_warnings_are_shown_and_a_second_call_adds_no_filter():
    silence_library_warnings()
    silence_gpu_kernel_advice()
    before = [list(logging.getLogger(name).filters) for name in LOGGERS], list(warnings.filters)
    silence_library_warnings()
    silence_gpu_kernel_advice()
    assert ([list(logging.getLogger(name).filters) for name in LOGGERS], list(warnings.filters)) == before
    assert [len(filters) for filters in before[0]] == [1] * len(LOGGERS)
    with pytest.warns(UserWarning, match="another warning"):
        warnings.warn("another warning", UserWarning, stacklevel=1)
