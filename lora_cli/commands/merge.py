"""`lora merge`: write an adapter merged into its base (W + scale·BA), verified; or unmerge it again."""

from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.merging import stream
from lora_cli.model import safetensors_io
from lora_cli.model.adapter_files import AdapterFiles, open_adapter
from lora_cli.model.model_source import find_model, local_folder
from lora_cli.model.saved_adapter import CPU, SavedAdapter, base_path, check_same_base, find_base
from lora_cli.recipe.schema import ModelSpec
from lora_cli.run import console
from lora_cli.run.checksums import verified_folder
from lora_cli.run.disk_space import Need, check_free_space
from lora_cli.run.output_path import check_output_path
from lora_cli.run.redact import redact_path
from lora_cli.run.workspace import remove_leftovers
from lora_cli.setup.adapter_folders import find_adapter
from lora_cli.setup.held_out import HeldOutRows
from lora_cli.setup.merged_model import (
    DTYPES,
    MergeOptions,
    check_base_merges,
    check_method_merges,
    describe_size,
    plan_merge,
    size_record,
    write_merged_model,
    write_other_files,
    write_tensors,
)


class MergeRequest(NamedTuple):
    """Options of the command line."""

    base: str | None
    dtype: str
    weights: str  # auto, original or dequantized
    verify: str  # logits or tensors
    max_shard_size: int  # bytes
    force: bool
    unmerge: bool
    other_base: bool
    trust_remote_code: bool


def merge(folder: Path, *, out: Path, request: MergeRequest) -> dict[str, Any]:
    """Write the adapter of the run or in the folder `folder`, merged into its base, to `out`, and print that path.

    Returns:
        The figures for JSON.

    Raises:
        LoraError: adapter, base and options do not fit, the method cannot be merged, or the merged model is wrong.
    """
    remove_leftovers(out.absolute().parent, out.name)  # of a merge that was killed
    files = open_adapter(find_adapter(folder))
    check_method_merges(files)
    _check_paths(files, out, request)
    adapter = find_base(files, path=request.base, trust_remote_code=request.trust_remote_code)
    check_base_merges(adapter)
    if not request.unmerge:
        check_same_base(files, adapter.base, allowed=request.other_base)
    options = MergeOptions(request.dtype, request.weights, request.verify, request.max_shard_size, request.force)
    if request.unmerge:
        figures = _unmerge(adapter, out, options)
    else:
        figures = write_merged_model(adapter, out, options=options, held_out=HeldOutRows(files.folder))
    console.out.print(str(out))
    names = {"adapter": redact_path(str(files.folder)), "method": files.method, "base": redact_path(adapter.base.name)}
    return {"out": out, **names, "unmerged": request.unmerge, **figures}


def _check_paths(adapter: AdapterFiles, out: Path, request: MergeRequest) -> None:
    if request.unmerge and request.base is None:
        raise LoraError("--unmerge: the merged model is missing", hint="name its folder: --base MERGED")
    base = Path(request.base or str(base_path(adapter)))
    check_output_path(out, inputs=(base, adapter.folder), replace=request.force, command="merge")


def _unmerge(adapter: SavedAdapter, out: Path, options: MergeOptions) -> dict[str, Any]:
    """Subtract the update from a merged model; possible only if all changes are low-rank sums."""
    plan = plan_merge(adapter, DTYPES.get(options.dtype))
    if names := plan.irreversible_changes():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise LoraError(
            f"--unmerge: {adapter.files.method} did more than add to {names[0]}{more}, and the original values are "
            "lost",
            hint="use the original base",
        )
    check_free_space([Need(out, plan.size, "the unmerged model")])
    with verified_folder(out, kind="merged model", published=False, replace=options.replace) as partial:
        console.info(f"unmerging {adapter.files.method} from {adapter.base.name}: {describe_size(plan)}")
        write_tensors(plan, partial, max_shard_bytes=options.max_shard_bytes, transforms={}, sign=-1)
        write_other_files(adapter, plan, partial, dtype=options.dtype, what="unmerged")
        line = _compare_with_original(adapter, partial)
    console.info(line)
    return size_record(plan)


def _compare_with_original(adapter: SavedAdapter, folder: Path) -> str:
    """Return how far the weights are from those of the base that the adapter names, if that base is available."""
    path = str(base_path(adapter.files))
    try:
        spec = ModelSpec(path=path, revision=adapter.files.config.revision, gguf="dequantized")
        source = find_model(spec, dtype=adapter.base.dtype, device=CPU, info=console.no_output)
        original = safetensors_io.list_tensors(local_folder(source, fetch=False))
    except LoraError as reason:
        return f"not compared with the original: {reason.message}"
    merged = safetensors_io.list_tensors(local_folder(adapter.base.source, fetch=False))
    difference = stream.compare_files(safetensors_io.list_tensors(folder), original, merged=merged)
    return (
        f"compared with {path}: {difference.equal_share:.1%} of the weights are equal, the others within "
        f"{difference.max_ulps:.2f} units in the last place ({difference.worst_tensor})"
    )
