"""Trackers of other tools (W&B, TensorBoard, ...): carried to the recipe's `tracking` section."""

import re

from lora_cli.convert.config import Config, as_list, as_switch
from lora_cli.convert.draft import Draft
from lora_cli.convert.secrets import hide
from lora_cli.convert.tables import TRACKING
from lora_cli.recipe.tracking_section import TRACKERS

SAME = {"comet": "comet_ml"}  # transformers' names, and Accelerate's
MODES = {"wandb": ("wandb_mode",), "swanlab": ("swanlab_mode",), "comet_ml": ("comet_mode",)}
NO_TRACKER = "tracking.to has no tracker of this name"

SWITCHES = {
    "use_wandb": "wandb",
    "use_tensorboard": "tensorboard",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_swanlab": "swanlab",
    "use_trackio": "trackio",
}
PROJECTS = {
    "wandb_project": "wandb",
    "mlflow_experiment_name": "mlflow",
    "comet_project_name": "comet_ml",
    "swanlab_project": "swanlab",
    "trackio_project_name": "trackio",
    "project_name": "",
}
NAMES = ("wandb_name", "wandb_run_name", "run_name", "mlflow_run_name", "swanlab_run_name", "trackio_run_name")
OTHERS = (
    "wandb_entity wandb_watch wandb_log_model wandb_mode wandb_run_id wandb_group wandb_job_type wandb wandb_run_group "
    "mlflow_tracking_uri hf_mlflow_log_artifacts comet_api_key comet_workspace comet_experiment_key comet_mode "
    "comet_online comet_experiment_config swanlab_workspace swanlab_mode swanlab_api_key swanlab_logdir "
    "swanlab_lark_webhook_url swanlab_lark_secret trackio_space_id otel_metrics_host otel_metrics_port "
    "use_otel_metrics logger_name tracking_uri"
)
KEYS = " ".join(("report_to", *SWITCHES, *PROJECTS, *NAMES, OTHERS))


def carry_tracking(draft: Draft) -> None:
    """Carry the trackers, and add their lines."""
    config = draft.config
    named = [SAME.get(name, name) for name in map(str, as_list(config.get("report_to")))]
    wanted: list[str] = [name for name in dict.fromkeys(named) if name in TRACKERS]
    others = ", ".join(name for name in named if name not in TRACKERS and name != "none")
    used = {"report_to"} if wanted else set()
    for key, tracker in {**SWITCHES, **PROJECTS}.items():
        if as_switch(config.get(key)) not in (None, False, "") and tracker and tracker not in wanted:
            wanted.append(tracker)
            used.add(key)
    wanted = [tracker for tracker in wanted if not _is_off(config, tracker)]
    if wanted:
        for key in sorted(used):
            if key == "report_to":
                draft.carry(key, "tracking.to", wanted, f"{others}: {NO_TRACKER}" if others else "")
            elif {**SWITCHES, **PROJECTS}[key] in wanted:
                draft.carry(key, "tracking.to", wanted)
        _carry_names(draft, wanted)
        _carry_places(draft, wanted)
    if others:
        draft.no_effect("report_to", f"{others}: {NO_TRACKER}")
    for key in KEYS.split():
        draft.no_effect(key, TRACKING)


def _is_off(config: Config, tracker: str) -> bool:
    switched = any(as_switch(config.get(key)) is False for key, name in SWITCHES.items() if name == tracker)
    return switched or any(str(config.get(key)).lower() == "disabled" for key in MODES.get(tracker, ()))


def _carry_names(draft: Draft, wanted: list[str]) -> None:
    """Carry the project and the name of the run, of the trackers that are used."""
    for to, keys in (("project", tuple(PROJECTS)), ("name", NAMES)):
        for key in keys:
            tracker = next((name for name in TRACKERS if key.startswith(name.removesuffix("_ml"))), "")
            if draft.config.get(key) and tracker in ("", *wanted):
                draft.carry(key, f"tracking.{to}", str(draft.config.get(key)))
                break


def _carry_places(draft: Draft, wanted: list[str]) -> None:
    """Carry where runs are sent to: an account, a server, a Space, or files on this machine."""
    config = draft.config
    places = (
        ("entity", "wandb_entity", "wandb"),
        ("entity", "comet_workspace", "comet_ml"),
        ("entity", "swanlab_workspace", "swanlab"),
        ("server", "mlflow_tracking_uri", "mlflow"),
        ("space", "trackio_space_id", "trackio"),
    )
    for to, key, tracker in places:
        value = config.get(key)
        if not value or tracker not in wanted or f"tracking.{to}" in draft.values:
            continue
        if hide(key, str(value)) != str(value):
            draft.no_effect(key, "has a secret in it: write the address without it, and the secret in the environment")
        elif to == "server" and not re.match(r"https?://[^/]|databricks|file:|sqlite:", str(value)):
            draft.no_effect(key, "is not the address of a server: write tracking.server")
        else:
            draft.carry(key, f"tracking.{to}", str(value))
    for tracker, keys in MODES.items():
        for key in keys:
            mode = str(config.get(key)).lower()
            if tracker in wanted and mode in ("offline", "local", "dryrun"):
                draft.carry(key, "tracking.offline", True)
    if "comet_ml" in wanted and as_switch(config.get("comet_online")) is False:
        draft.carry("comet_online", "tracking.offline", True)
