"""Warnings of libraries that no user of `lora` can act on: each by its exact text, with the reason. No torch.

Whatever is not named here still comes through.
"""

import logging
import warnings


def silence_library_warnings() -> None:
    """Silence them; call it before the libraries are imported, as one of them speaks while being so."""
    # PEFT 0.21 asks transformers 5.23 by a name that has a newer one; the answer is the same.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
    # GPT-2's layers hold their weights transposed, which PEFT sees by itself.
    warnings.filterwarnings("ignore", r"fan_in_fan_out is set to False but the target module is `Conv1D`", UserWarning)
    # AdaLoRA's pattern has a name for each layer's lora_E, where PEFT's check looks for names of layers.
    warnings.filterwarnings("ignore", r"The following rank_pattern keys did not match any targeted", RuntimeWarning)
    # What recipes may set is checked in model/target_modules.py; EVA's advice is about models too large for one device.
    warnings.filterwarnings("ignore", r"`init_lora_weights='eva'`|.*low_cpu_mem_usage=False", UserWarning)
    # BOFT without its extension takes one butterfly; recipes that want more are refused.
    warnings.filterwarnings("ignore", r"Failed to load the CUDA extension", UserWarning)
    # scikit-learn's coefficient of rows that all have one label, and were given it: 0, as it says.
    warnings.filterwarnings("ignore", r"A single label was found in 'y_true' and 'y_pred'", UserWarning)
    # bitsandbytes' int8 product takes fp16, and casts whatever comes: it says so at every layer.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_int8_cast)
    warnings.filterwarnings("ignore", r"MatMul8bitLt: inputs will be cast from", UserWarning)
    # Tensors that a checkpoint lacks or has beyond the model are counted and told, or refused, in model/base_model.py.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_load_report)
    # bitsandbytes 0.50 looks on import for a 4-bit product that only generation on some CPUs would use, in a
    # package that nothing here needs; it says so in runs that quantise nothing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_missing_kernel)


def _is_not_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


def _is_not_int8_cast(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _is_not_missing_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
