"""Experiment trackers, through Accelerate: how each is started, continued, given the config and files, and ended.

Only `tracker_process.py`, a process of its own for each tracker, uses this file; the libraries are imported here.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from lora_cli.recipe.dump import dump_values
from lora_cli.recipe.tracking_section import TrackerName
from lora_cli.run.redact import redact_address
from lora_cli.run.shell import shell_path
from lora_cli.training.tracker_job import Job, Status

EXIT_CODES: dict[Status, int] = {"finished": 0, "stopped": 130, "failed": 1}
MLFLOW_STATUS: dict[Status, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
MLFLOW_VALUE = 6000  # characters of a parameter's value; its store refuses longer ones
# Defaults of environment variables of the libraries: errors soon, because they are tried again here, and no reports of
# their own to their makers.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}


class Tracker(NamedTuple):
    """How one tracker is used; `tracker` stands for Accelerate's object."""

    options: Callable[[Job], dict[str, Any]]  # of Accelerate's tracker, beside the project
    run_id: Callable[[Any], str]  # of the started tracker
    place: Callable[[Job, Any], str]  # where a user finds it: an address or a folder
    send_config: Callable[[Job, Any, Mapping[str, Any]], None]
    finish: Callable[[Any, Status], None]
    upload: Callable[[Job, Any, Path], None] | None = None  # the files of a folder; None: it stores no files


def start(job: Job) -> GeneralTracker:
    """Start the tracker of a job, with a new tracked run or the one that goes on; what it raises is its library's."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    PartialState(cpu=True)  # Accelerate's logger needs it; no process here uses a device
    project, options = job.project, TABLE[job.tracker].options(job)
    # Accelerate lets them take precedence over the recipe.
    for variable in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_TAGS", *(("MLFLOW_RUN_ID",) if job.run_id else ())):
        os.environ.pop(variable, None)
    if job.tracker == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS["tensorboard"]("tensorboard", logging_dir=str(job.folder), **options)
    else:
        tracker = LOGGER_TYPE_TO_CLASS[job.tracker](project, **options)
    tracker.start()
    return cast(GeneralTracker, tracker)


def _finish(tracker: Any, _: Status) -> None:
    tracker.finish()


# TensorBoard


def _tensorboard_options(job: Job) -> dict[str, Any]:
    # Its reader leaves out the events from this step on that earlier starts have written.
    return {"purge_step": job.done + 1} if job.run_id else {}


def _tensorboard_config(job: Job, tracker: Any, config: Mapping[str, Any]) -> None:
    """Write the config as texts: its hyperparameters would be a run of their own beside this one."""
    if job.configured:
        return
    texts = {"config/recipe": f"```yaml\n{dump_values(config['recipe'])}\n```"}
    for name, value in config.items():
        if name != "recipe":
            texts[f"config/{name}"] = f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"
    tracker.log(texts, step=0)


# Weights & Biases


def _wandb_options(job: Job) -> dict[str, Any]:
    import wandb

    if job.spec.offline:  # the files to be sent later are kept with the rest
        os.environ.setdefault("WANDB_DATA_DIR", str(job.folder.resolve() / "wandb"))
    settings = wandb.Settings(
        # What it would find by itself: command line, folders, user, host, git and installed packages.
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        console="off",
        x_stats_pid=job.pid,  # system metrics of the training process, not of this one
    )
    options = {
        "id": job.run_id or job.new_id[:8],
        "resume": "allow",
        "name": job.name,
        "tags": job.spec.tags or None,
        "entity": job.spec.entity,
        "dir": str(job.folder),
        "settings": settings,
    }
    return options | ({"mode": "offline"} if job.spec.offline else {})


def _wandb_place(job: Job, tracker: Any) -> str:
    url = tracker.tracker.url
    if url:
        return f"at {redact_address(url)}"
    return f"offline; to send it: wandb sync {shell_path(job.folder / 'wandb')}/offline-*"


def _wandb_config(_: Job, tracker: Any, config: Mapping[str, Any]) -> None:
    tracker.store_init_configuration(dict(config))


def _wandb_upload(_: Job, tracker: Any, files: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"run-{tracker.tracker.id}", type="run")
    artifact.add_dir(str(files))
    tracker.tracker.log_artifact(artifact)


def _wandb_finish(tracker: Any, status: Status) -> None:
    tracker.tracker.finish(exit_code=EXIT_CODES[status])


# MLflow


def _mlflow_options(job: Job) -> dict[str, Any]:
    import mlflow

    if job.spec.server:
        mlflow.set_tracking_uri(job.spec.server)
    # Without these tags, it sends the path of this program, and the state of the git repository around it.
    tags = {"mlflow.source.name": "lora train", "mlflow.source.type": "LOCAL", "mlflow.source.git.commit": ""}
    return {"run_id": job.run_id, "run_name": job.name, "tags": tags | dict.fromkeys(job.spec.tags, "true")}


def _mlflow_place(_: Job, tracker: Any) -> str:
    import mlflow

    info = tracker.tracker.info
    address = redact_address(mlflow.get_tracking_uri())
    if not address.startswith("http"):
        return f"in {address.rpartition('/')[2]}, run {info.run_id}"
    return f"at {address}/#/experiments/{info.experiment_id}/runs/{info.run_id}"


def _mlflow_config(job: Job, tracker: Any, config: Mapping[str, Any]) -> None:
    """Send the config as parameters, once: they cannot be changed."""
    if job.configured:
        return
    texts = dict(_flatten(config))
    cut = {key: text if len(text) <= MLFLOW_VALUE else f"{text[: MLFLOW_VALUE - 1]}…" for key, text in texts.items()}
    tracker.store_init_configuration(cut)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return texts by dotted key; a list is one text, as JSON."""
    pairs: list[tuple[str, str]] = []
    for name, value in tree.items():
        key = f"{prefix}{_parameter_name(name)}"
        if isinstance(value, Mapping) and value:
            pairs += _flatten(value, f"{key}.")
        else:
            pairs.append((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return pairs


def _parameter_name(name: str) -> str:
    """Return a name with the characters that MLflow allows in those of parameters."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def _mlflow_upload(_: Job, tracker: Any, files: Path) -> None:
    tracker.log_artifacts(str(files))


def _mlflow_finish(_: Any, status: Status) -> None:
    import mlflow

    mlflow.end_run(MLFLOW_STATUS[status])


# trackio


def _trackio_options(job: Job) -> dict[str, Any]:
    # Its runs are found by their names, and those of two run folders can be equal.
    name = job.run_id or f"{job.name}-{job.new_id[:8]}"
    tags = {"config": {"tags": job.spec.tags}} if job.spec.tags else {}
    return {"name": name, "resume": "allow", "space_id": job.spec.space, "embed": False, **tags}


def _trackio_place(job: Job, tracker: Any) -> str:
    if job.spec.space:
        return f"in the Space {job.spec.space}, run {tracker.tracker.name}"
    return f"as run {tracker.tracker.name}: trackio show --project {shlex.quote(job.project)}"


def _trackio_config(job: Job, tracker: Any, config: Mapping[str, Any]) -> None:
    # Accelerate calls it like W&B's, with an argument that the configuration, a dict, would take for a value.
    tracker.tracker.config.update(config)


def _trackio_upload(_: Job, tracker: Any, files: Path) -> None:
    tracker.tracker.log_artifact(str(files), name=tracker.tracker.name, type="run")


# Comet


def _comet_options(job: Job) -> dict[str, Any]:
    import comet_ml

    folder = job.folder / "comet_ml"
    folder.mkdir(exist_ok=True)
    config = comet_ml.ExperimentConfig(
        name=job.name,
        tags=job.spec.tags or None,
        offline_directory=str(folder),
        # What it would find by itself: see W&B's.
        log_code=False,
        log_graph=False,
        log_git_metadata=False,
        log_git_patch=False,
        log_env_details=False,
        parse_args=False,
        auto_param_logging=False,
        auto_metric_logging=False,
        auto_output_logging=False,
        auto_log_co2=False,
        display_summary_level=0,
    )
    return {
        "workspace": job.spec.entity,
        "experiment_key": job.run_id or job.new_id,
        "mode": "get_or_create",
        "online": not job.spec.offline,
        "experiment_config": config,
    }


def _comet_config(_: Job, tracker: Any, config: Mapping[str, Any]) -> None:
    tracker.store_init_configuration(dict(_flatten(config)))


def _comet_place(job: Job, tracker: Any) -> str:
    offline = f"offline; to send it at the end: comet upload {job.folder}/comet_ml/*.zip"
    return offline if job.spec.offline else f"at {redact_address(tracker.tracker.url)}"


def _comet_upload(_: Job, tracker: Any, files: Path) -> None:
    for file in sorted(files.iterdir()):
        tracker.tracker.log_asset(str(file), file_name=file.name, copy_to_tmp=True)


# SwanLab


def _swanlab_options(job: Job) -> dict[str, Any]:
    import swanlab

    folder = job.folder / "swanlab"
    folder.mkdir(exist_ok=True)
    # What it would find by itself: see W&B's.
    found = swanlab.Settings.Probe(runtime=False, requirements=False, git=False, swanlab=False)
    options = {
        "id": job.run_id or job.new_id[:21],
        "resume": "allow",
        "workspace": job.spec.entity,
        "name": job.name,
        "tags": job.spec.tags or None,
        "log_dir": str(folder),
        "settings": swanlab.Settings(probe=found, interactive=False),
    }
    return options | ({"mode": "offline"} if job.spec.offline else {})


def _swanlab_config(_: Job, __: Any, config: Mapping[str, Any]) -> None:
    import swanlab

    swanlab.config.update(dict(config))  # as for trackio


def _swanlab_place(job: Job, tracker: Any) -> str:
    if job.spec.offline:
        return f"offline; to send it: swanlab sync {job.folder}/swanlab/run-*"
    return f"at {redact_address(getattr(tracker.tracker, 'url', None) or 'swanlab.cn')}"


TABLE: dict[TrackerName, Tracker] = {
    "tensorboard": Tracker(
        _tensorboard_options,
        lambda _: "tensorboard",
        lambda job, _: f"in {job.folder}/tensorboard",
        _tensorboard_config,
        _finish,
    ),
    "wandb": Tracker(
        _wandb_options,
        lambda tracker: str(tracker.tracker.id),
        _wandb_place,
        _wandb_config,
        _wandb_finish,
        _wandb_upload,
    ),
    "mlflow": Tracker(
        _mlflow_options,
        lambda tracker: str(tracker.tracker.info.run_id),
        _mlflow_place,
        _mlflow_config,
        _mlflow_finish,
        _mlflow_upload,
    ),
    "trackio": Tracker(
        _trackio_options,
        lambda tracker: str(tracker.tracker.name),
        _trackio_place,
        _trackio_config,
        _finish,
        _trackio_upload,
    ),
    "comet_ml": Tracker(
        _comet_options,
        lambda tracker: str(tracker.tracker.get_key()),
        _comet_place,
        _comet_config,
        _finish,
        _comet_upload,
    ),
    "swanlab": Tracker(
        _swanlab_options, lambda tracker: str(tracker.tracker.id), _swanlab_place, _swanlab_config, _finish
    ),
}
