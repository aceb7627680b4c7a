"""Warnings of libraries that no user of `lora` can act on: each by its exact text, with the reason. No torch.

Whatever is not named here still comes through.
"""

import logging
import warnings


def hush() -> None:
    """Silence them; call it before the libraries are imported, as one of them speaks while being so."""
    # PEFT 0.21 asks transformers 5.23 by a name that has a newer one; the answer is the same.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
    # bitsandbytes 0.50 looks on import for a 4-bit product that only generation on some CPUs would use, in a
    # package that nothing here needs; it says so in runs that quantise nothing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_missing_kernel)


def _is_not_missing_kernel(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
