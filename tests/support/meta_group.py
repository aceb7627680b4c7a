"""A group of processes of GPUs of which this one alone runs: the meta device is the GPU, and nothing is exchanged.

torch's fake process group leaves the outputs of collectives as they are, which meta tensors without data do not mind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed import fake_pg

BACKEND = "fake_gpus"


@contextmanager
def meta_group(*, size: int) -> Iterator[None]:
    """Within the block, this is the first of `size` processes, whose GPU the meta device is."""
    if BACKEND not in distributed.Backend.backend_list:
        devices = ["cpu", "meta"]
        distributed.Backend.register_backend(BACKEND, fake_pg._create_fake_pg, extended_api=True, devices=devices)
    with pytest.MonkeyPatch.context() as patch:
        # Streams and events of the device; those of the CPU do nothing.
        patch.setattr(torch, "meta", SimpleNamespace(**vars(torch.cpu) | {"current_device": lambda: 0}), raising=False)
        # Weights on the meta device are not yet loaded to FSDP; here they are on the GPU.
        patch.setattr(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)
        distributed.init_process_group(BACKEND, rank=0, world_size=size, store=fake_pg.FakeStore())
        try:
            yield
        finally:
            distributed.destroy_process_group()
