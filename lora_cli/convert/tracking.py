"""Trackers of other tools (W&B, TensorBoard, ...): carried to the recipe's `tracking` section, if it has one."""

from lora_cli.convert.config import as_list
from lora_cli.convert.draft import Draft
from lora_cli.convert.tables import TRACKING
from lora_cli.recipe.schema import Recipe

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


def section_fields() -> set[str]:
    """Return the keys of the recipe's tracking section; empty if the recipe has none."""
    field = Recipe.model_fields.get("tracking")
    if field is None:
        return set()
    schema = Recipe.model_json_schema()
    options = schema["properties"]["tracking"].get("anyOf", [schema["properties"]["tracking"]])
    names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
    return {key for name in names for key in schema["$defs"][name]["properties"]}


def carry_tracking(draft: Draft) -> None:
    """Add the lines of trackers; carry them if the recipe's schema has a section for them."""
    config, fields = draft.config, section_fields()
    wanted = [name for name in map(str, as_list(config.get("report_to"))) if name not in ("none", "all")]
    used = {"report_to"} if wanted else set()
    for key, tracker in {**SWITCHES, **PROJECTS}.items():
        if config.get(key) and tracker and tracker not in wanted:
            wanted.append(tracker)
            used.add(key)
    if wanted and "to" in fields:
        for key in sorted(used):
            draft.carry(key, "tracking.to", wanted)
        for to, keys in (("project", tuple(PROJECTS)), ("name", NAMES)):
            found = next((key for key in keys if config.get(key)), None)
            if found and to in fields:
                draft.carry(found, f"tracking.{to}", str(config.get(found)))
    for key in KEYS.split():
        draft.no_effect(key, TRACKING)
