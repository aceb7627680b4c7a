"""The folder in which the cases of a campaign run: tiny model, rows, recipes, two finished runs; and what is in it.

prepare(folder)     base-model/ and template/, which has the inputs and the runs runs/a and runs/b
fresh(folder)       work/, a copy of template/ for one case
contents(path)      digests of the files in a folder, without what differs between two equal runs
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_cli.run.run_lock import LOCK
from tests.commands.conftest import write_inputs, write_recipe
from tests.faults import forked_lora
from tests.faults.mounts import mount_small_disk, unmount, used_space
from tests.inputs.tiny_tokenizers import CHATML, build

Contents = dict[str, str]  # digest of a file, or the target of a link, by path; empty: nothing is there

# A command of LLaMA-Factory, the config that it names, and the table of the datasets that this one names.
OTHER_TOOL = {
    "train.sh": "llamafactory-cli train other.yaml learning_rate=1e-4\n",
    "other.yaml": "{model_name_or_path: a/b, stage: sft, do_train: true, finetuning_type: lora, dataset_dir: .,"
    " dataset: rows, template: chatml, cutoff_len: 64, output_dir: out}",
    "dataset_info.json": '{"rows": {"file_name": "train.jsonl", "formatting": "sharegpt"}}',
}
EMPTY = "an empty folder"  # in place of a digest

# Recipes of runs/new, which cases train; all are small, and save often.
RECIPES: dict[str, dict[str, Any]] = {
    "recipe": {"training.save_every": 1, "training.keep_checkpoints": 1},
    "best": {"training.save_every": 1, "training.keep": "best", "training.keep_checkpoints": 1},
    "long": {"training.max_steps": 12, "training.keep_checkpoints": 2, "training.answer_every": 4},
    "packed": {"training.max_steps": 8, "data.packing": True, "training.gradient_accumulation": 2},
    "free": {"training.max_steps": 8, "training.optimizer": "schedule-free-adamw", "adapter.dropout": 0.0},
    "adalora": {"training.max_steps": 8, "adapter.method": "adalora", "adapter.rank": 2, "adapter.final_rank": 1},
    "gguf": {"training.max_steps": 1, "model.path": "base.gguf", "training.eval_every": None},
    "continue": {"training.max_steps": 1, "adapter": {}},
    "two": {"training.max_steps": 8, "distributed.processes": 2},
}


def prepare(folder: Path) -> None:
    """Write the model and the template of the working folders into `folder`, which has nothing of these names.

    Campaigns take it from the folder `workplace` beside `folder`, so that it is made once.
    """
    shared = folder.parent / "workplace"
    if not shared.is_dir():
        partial = folder.parent / "workplace-partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _make(partial)
        partial.rename(shared)
    shutil.copytree(shared, folder, symlinks=True, dirs_exist_ok=True)


def _make(folder: Path) -> None:
    from tests.model import zoo

    tokenizer = build("<|im_start|>", "<|endoftext|>", eos="<|im_end|>", template=CHATML)
    zoo.make("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base-model")
    tokenizer.save_pretrained(folder / "base-model")
    work = folder / "work"
    work.mkdir()
    write_inputs(work, Path("../base-model"))
    for name, changes in RECIPES.items():
        write_recipe(work / f"{name}.yaml", {"output": "runs/new", **changes})
    for name, text in OTHER_TOOL.items():
        (work / name).write_text(text)
    for name, seed in (("a", 1), ("b", 2)):
        write_recipe(work / f"{name}.yaml", {"output": f"runs/{name}", "training.seed": seed})
        lora(f"train {name}.yaml", work)
        _pickle_adapter(work / "runs" / name / "adapter", work / f"pickled-{name}")
    lora("export base --to gguf --out base.gguf --verify file", work)
    work.rename(folder / "template")


def _pickle_adapter(adapter: Path, folder: Path) -> None:
    """Write an adapter as older versions of PEFT did, which `lora adapter convert` reads."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), folder / "adapter_model.bin")
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")


def lora(command: str, work: Path) -> None:
    """Run a command that must succeed.

    Raises:
        RuntimeError: it fails.
    """
    ended = forked_lora.run(command.split(), work, environment=environment(work))
    if ended.code:
        raise RuntimeError(f"lora {command}: exit code {ended.code}: {ended.err[-1000:]}")


def environment(work: Path) -> dict[str, str]:
    """Return the variables of commands in a working folder: the cache is in it, so that faults hit it, too."""
    return {"LORA_CACHE": str(work / "cache")}


@contextmanager
def fresh(folder: Path, *more: Path, free: int | None = None) -> Iterator[Path]:
    """Yield a copy of the template and of the folders `more`, which is removed afterwards.

    Args:
        folder: prepared.
        more: folders whose files replace those of the template.
        free: bytes that are free on its file system, which is in memory; None: on that of `folder`.

    Raises:
        OSError: a file system cannot be mounted.
    """
    work = folder / "work"
    work.mkdir()
    sources = [folder / "template", *(path for path in more if path.exists())]
    try:
        if free is not None:
            mount_small_disk(work, sum(map(used_space, sources)) + free)
        for source in sources:
            shutil.copytree(source, work, symlinks=True, dirs_exist_ok=True)
        yield work
    finally:
        if work.is_mount():
            unmount(work)
        if work.exists():  # it may have vanished, as a fault
            shutil.rmtree(work)


def remove_cache(work: Path) -> None:
    """Remove the encoded rows, so that a command encodes them."""
    shutil.rmtree(work / "cache")


def contents(path: Path, *, without: tuple[str, ...] = ()) -> Contents:
    """Return what is at `path`, a file or a folder with all below it, except the entries `without` of the folder."""
    if path.is_symlink() or not path.is_dir():
        return {".": _digest(path)} if os.path.lexists(path) else {}
    found = {}
    for parent, folders, files in os.walk(path):
        if Path(parent) == path:
            folders[:] = [name for name in folders if name not in without]
            files = [name for name in files if name not in without]
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for name in (*files, *links):
            if name != LOCK:
                found[str(Path(parent, name).relative_to(path))] = _digest(Path(parent, name))
        if not files and not folders:
            found[str(Path(parent).relative_to(path))] = EMPTY
    return dict(sorted(found.items()))


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        with suppress(ValueError, AttributeError):
            records = [json.loads(line) for line in data.splitlines()]
            own = ("seconds", "peak_memory")  # of each process
            data = json.dumps([{k: v for k, v in each.items() if k not in own} for each in records]).encode()
    if path.name == "manifest.json":
        with suppress(ValueError, AttributeError):
            started = ("command", "recipe_file")  # of the last start: with --resume, for example
            data = json.dumps({k: v for k, v in json.loads(data).items() if k not in started}).encode()
    # The log of a run has times, its manifest the command, and the key of a cache entry has paths.
    if path.name == "checksums.json":
        with suppress(ValueError, AttributeError, KeyError):
            record = json.loads(data)
            if record["kind"] in ("run", "cache entry"):
                files = {**record["files"], "metrics.jsonl": None, "manifest.json": None}
                data = json.dumps({**record, "key": None, "files": files}).encode()
    if path.parent.name.startswith("step-"):  # a checkpoint also records place, machine and changes of its run
        with suppress(ValueError, AttributeError, KeyError):
            if path.name == "state.json":
                state = json.loads(data)
                # A signal leaves out the evaluation of its step, which the resumed run makes.
                data = json.dumps([state[key] for key in ("step", "trained", "data")]).encode()
            elif path.name == "checksums.json":
                record = json.loads(data)
                data = json.dumps({**record, "files": {**record["files"], "state.json": None}}).encode()
    return sha256(data).hexdigest()[:16]


def difference(found: Contents, expected: Contents) -> str:
    """Return one line on the first differences of two contents; empty if they are equal."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is extra" for name in found if name not in expected]
    lines += [f"{name} differs" for name in found if name in expected and found[name] != expected[name]]
    return ", ".join(lines[:4])


def leftovers(work: Path) -> list[str]:
    """Return the temporary files and folders in a working folder."""
    return sorted(str(path.relative_to(work)) for path in work.rglob(".tmp-*"))
