"""Tracking keys of other tools (report_to, wandb_project, ...), and what to write in `tracking:` instead. No torch.

From the configuration classes of axolotl, LLaMA-Factory, transformers and TRL; `recipe/other_tools.py` adds them.
"""

_NO_SECRETS = "a recipe must not contain secrets"

# Another tool's key: the recipe key with the same meaning.
RENAMED_TRACKERS: dict[str, str] = {
    "report_to": "tracking.to",
    "log_with": "tracking.to",
    "trackers": "tracking.to",
    "metric_logger": "tracking.to",
    "run_name": "tracking.name",
    "wandb_project": "tracking.project",
    "wandb_entity": "tracking.entity",
    "wandb_name": "tracking.name",
    "wandb_run_name": "tracking.name",
    "wandb_tags": "tracking.tags",
    "wandb_log_model": "tracking.artifacts",
    "mlflow_tracking_uri": "tracking.server",
    "mlflow_experiment_name": "tracking.project",
    "mlflow_run_name": "tracking.name",
    "hf_mlflow_log_artifacts": "tracking.artifacts",
    "trackio_space_id": "tracking.space",
    "trackio_project_name": "tracking.project",
    "trackio_run_name": "tracking.name",
    "comet_project_name": "tracking.project",
    "comet_workspace": "tracking.entity",
    "swanlab_project": "tracking.project",
    "swanlab_workspace": "tracking.entity",
    "swanlab_run_name": "tracking.name",
}
# Another tool's key that has no counterpart: what to do.
REPLACED_TRACKERS: dict[str, str] = {
    **dict.fromkeys(("logging_dir", "tensorboard_log_dir"), "remove it: tensorboard writes into the run folder"),
    **dict.fromkeys(
        ("wandb_run_id", "swanlab_run_id", "comet_experiment_key"),
        "remove it: the run folder keeps the id, and `--resume` goes on in the same tracked run",
    ),
    "wandb_watch": "remove it: steps and evaluations are tracked, not single weights",
    **{
        f"{tracker}_api_key": f"set {tracker.upper()}_API_KEY in the environment: {_NO_SECRETS}"
        for tracker in ("wandb", "comet", "swanlab")
    },
    **dict.fromkeys(
        ("api_key", "api_token", "password", "secret", "token"),
        f"set it in the environment, as WANDB_API_KEY, HF_TOKEN or the like: {_NO_SECRETS}",
    ),
}
# Fixes by value, as in `recipe/other_tool_values.py`.
_SWITCHES = {
    f"use_{tracker}": {"true": f"write `tracking: {{{{to: [{name}]}}}}`", "nothing": "remove it: that is the default"}
    for tracker, name in {
        "wandb": "wandb",
        "tensorboard": "tensorboard",
        "mlflow": "mlflow",
        "comet": "comet_ml",
        "swanlab": "swanlab",
        "trackio": "trackio",
    }.items()
}
_MODES = {
    "offline": "write `tracking: {{offline: true}}`",
    "online": "remove it: that is the default",
    "disabled": "leave the tracker out of tracking.to",
    "local": "write `tracking: {{offline: true}}`",
    "cloud": "remove it: that is the default",
}
_TO = {
    "nothing": "remove it: by default nothing is tracked",
    "all": "list the trackers: `tracking: {{to: [tensorboard, wandb]}}`",
    "comet": "write `tracking: {{to: [comet_ml]}}`",
    "other": "write `tracking: {{to: [{value}]}}`",
}
BY_VALUE_TRACKERS: dict[str, dict[str, str]] = {
    **_SWITCHES,
    "wandb_mode": _MODES,
    "swanlab_mode": _MODES,
    "report_to": _TO,
    "log_with": _TO,
}
