"""What a merge sets for a while is undone: one core for each thread of the pool, the weights of a layer in memory."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_cli.merging.deltas import find_deltas
from lora_cli.merging.merge_tensors import merge_layer, thread_pool
from lora_cli.model import empty_base, save_adapter
from lora_cli.model.adapter_files import open_adapter
from tests.model import zoo
from tests.support import checkpoints


def threads_of_a_new_thread() -> int:
    """Return torch's threads for a product in a new Python thread: what was set last, in whatever thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_restored_after_the_pool(fails: bool):
    torch.set_num_threads(2)
    try:
        with thread_pool() as pool:
            assert pool.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
            if fails:
                raise ValueError("weights that are not finite")
    except ValueError:
        assert fails
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)


def test_a_layer_has_no_weights_in_memory_after_its_merge(tmp_path: Path):
    base = zoo.make("llama")
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    save_adapter.save_adapter(zoo.adapted(base, method="dora"), tmp_path, base="base", revision=None)
    skeleton = empty_base.init_empty_weights(checkpoints.skeleton_of(zoo.make("llama").config))
    layer = find_deltas(empty_base.attach_saved_adapter(skeleton, open_adapter(tmp_path), base="base")).layers[0]
    written: dict[str, Tensor] = {}
    merge_layer(layer, read=weights.__getitem__, write=written.__setitem__, dtype_of=lambda name: torch.float32)
    assert written.keys() == {f"{layer.name}.weight"}
    weight = layer.module.get_parameter("weight")
    assert weight.shape == written[f"{layer.name}.weight"].shape
    assert weight.untyped_storage().nbytes() == 4  # one number, expanded to the shape
