"""Recipe schema of the tracking section, and the facts of each experiment tracker: package, login, files. No torch."""

from typing import Literal, NamedTuple, cast, get_args

from lora_cli.recipe.field_types import Count, Section, Switch

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "swanlab"]  # by Accelerate's names
TRACKER_NAMES: tuple[TrackerName, ...] = get_args(TrackerName)
PROJECT = "lora"  # default of tracking.project


class TrackerFacts(NamedTuple):
    """What a recipe and its messages need to know of a tracker."""

    module: str  # that `import` finds where it is installed
    install: str  # what pip installs
    login: str | None = None  # where its token comes from; None if it needs none
    project_variable: str | None = None  # environment variable with a project, where the recipe names none
    entity: bool = False  # it has accounts of teams
    offline: bool = False  # it can write files that are sent later
    artifacts: bool = True  # it stores files


TRACKERS: dict[TrackerName, TrackerFacts] = {
    "tensorboard": TrackerFacts("tensorboard", "tensorboard", artifacts=False),
    "wandb": TrackerFacts(
        "wandb",
        "wandb",
        login="WANDB_API_KEY, or `wandb login`",
        project_variable="WANDB_PROJECT",
        entity=True,
        offline=True,
    ),
    "mlflow": TrackerFacts(
        "mlflow",
        "mlflow",
        login="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        project_variable="MLFLOW_EXPERIMENT_NAME",
    ),
    "trackio": TrackerFacts("trackio", "trackio", login="HF_TOKEN", project_variable="TRACKIO_PROJECT"),
    "comet_ml": TrackerFacts(
        "comet_ml",
        "comet_ml",
        login="COMET_API_KEY, or `comet login`",
        project_variable="COMET_PROJECT_NAME",
        entity=True,
        offline=True,
    ),
    "swanlab": TrackerFacts(
        "swanlab",
        "swanlab",
        login="SWANLAB_API_KEY, or `swanlab login`",
        entity=True,
        offline=True,
        artifacts=False,
    ),
}


class TrackingSpec(Section):
    """Experiment trackers that get every step and evaluation. Leave the section out to track nothing."""

    to: list[TrackerName]
    """Trackers, each with its own package: tensorboard, wandb, mlflow, trackio, comet_ml, swanlab."""
    project: str | None = None
    """Project that the run belongs to (in MLflow: the experiment). Default: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or
    the like, else lora. TensorBoard has none."""
    name: str | None = None
    """Name of the run in the trackers. Default: the name of the run folder."""
    tags: list[str] = []
    """Tags of the run. Default: none."""
    entity: str | None = None
    """Team or user that the project belongs to: W&B's entity, the workspace of Comet and SwanLab. Default: that of the
    login."""
    server: str | None = None
    """Address of an MLflow server: http://HOST:5000. Default: MLFLOW_TRACKING_URI, else a local store."""
    space: str | None = None
    """Hub id of the Space that trackio sends to. Default: TRACKIO_SPACE_ID, else only this machine's store."""
    offline: Switch = False
    """W&B, Comet, SwanLab: write files into the run folder, to be sent later, and use no network. Default false."""
    artifacts: Switch = False
    """Upload the model card, recipe, manifest and metrics at the end, without paths of this machine. Default false."""
    timeout_seconds: Count = 60
    """Longest time that the end of a run waits for its trackers, in seconds. At least 1. Default 60."""


def facts_of(name: str) -> TrackerFacts:
    """Return the facts of a tracker of TRACKERS."""
    return TRACKERS[cast(TrackerName, name)]
