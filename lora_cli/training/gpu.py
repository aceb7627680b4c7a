"""Set up the process for training on NVIDIA GPUs: memory allocator, TF32, and links between GPUs that do not work."""

import os

import torch
from accelerate.utils.environment import check_cuda_p2p_ib_support

# PyTorch reads the first of them that is set, when it allocates for the first time.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_up_allocator() -> None:
    """Have torch grow its blocks of memory, unless the user has set its allocator; before the first allocation.

    Batches have other sizes in each step. Without it, free memory is in pieces that the next batch does not fit into.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def set_up_gpu(dtype: torch.dtype) -> None:
    """Multiply float32 matrices in TF32 where the run is not in float32: only those of the adapter and norms are."""
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")


def set_up_determinism() -> None:
    """Have torch, cuBLAS and flash attention take only operations that give the same bits each time.

    Call it before the first product on a GPU, which reads cuBLAS' setting. An operation that has no such form raises.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by transformers; torch's own kernel asks torch
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Nothing here reads memory that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def link_settings() -> dict[str, str]:
    """Return NCCL's settings for worker processes: several RTX 40xx with old drivers hang on their direct links."""
    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    if torch.cuda.device_count() < 2 or check_cuda_p2p_ib_support():
        return {}
    return {name: "1" for name in names if name not in os.environ}
