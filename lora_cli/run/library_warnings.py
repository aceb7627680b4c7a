"""Silence library warnings that users of `lora` cannot act on, each by its text and with the reason. No torch.

All other warnings are still shown.
"""

import logging
import warnings


def silence_library_warnings() -> None:
    """Install the warning and log filters; call it before the libraries are imported, because one warns on import."""
    # PEFT 0.21 uses a deprecated name of transformers 5.23; the value is the same.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
    # GPT-2's layers store their weights transposed, which PEFT detects.
    warnings.filterwarnings("ignore", r"fan_in_fan_out is set to False but the target module is `Conv1D`", UserWarning)
    # AdaLoRA's rank_pattern has keys for the lora_E of each layer, but PEFT's check expects names of layers.
    warnings.filterwarnings("ignore", r"The following rank_pattern keys did not match any targeted", RuntimeWarning)
    # EVA's advice is for models too large for one device.
    warnings.filterwarnings("ignore", r".*eva initialization used with low_cpu_mem_usage=False", UserWarning)
    # BOFT without its CUDA extension supports one butterfly factor; more in a recipe are an error.
    boft = r"Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1"
    warnings.filterwarnings("ignore", boft, UserWarning)
    # merging/ writes embeddings and head as two tensors if an adapter changes one of two that were tied.
    tied = r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
    warnings.filterwarnings("ignore", tied, UserWarning)
    # scikit-learn's Matthews correlation is 0 if all labels and predictions are the same class.
    warnings.filterwarnings("ignore", r"A single label was found in 'y_true' and 'y_pred'", UserWarning)
    # The int8 matrix product of bitsandbytes casts its inputs to fp16, and warns at every layer.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_int8_cast)
    # model/base_model.py counts and reports missing and unexpected tensors of a checkpoint, or raises an error.
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_load_report)
    # On import, bitsandbytes 0.50 looks for a 4-bit kernel that only generation on some CPUs uses, in a package that
    # is not needed here; it warns even in runs without quantization.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_missing_kernel)


def silence_gpu_kernel_advice() -> None:
    """Silence the advice of hybrid and state-space models to install kernels for GPUs; for a model on the CPU."""
    logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_not_kernel_advice)


def _is_not_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


def _is_not_int8_cast(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _is_not_missing_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


def _is_not_kernel_advice(record: logging.LogRecord) -> bool:
    return "is falling back to its reference PyTorch implementation" not in str(record.msg)
