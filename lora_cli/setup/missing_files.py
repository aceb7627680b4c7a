"""Tell that a model, rows or a run are not where the command line says, before the imports of seconds. No torch."""

from lora_cli.data.file_sources import check_local_path
from lora_cli.model.model_path import check_model_path
from lora_cli.recipe.schema import Recipe, SourceSpec
from lora_cli.run.folder import check_start
from lora_cli.run.worker import is_worker


def check_inputs_exist(recipe: Recipe, *, data: str | None = None) -> None:
    """Check that the model and the rows of a recipe exist, as far as they are on this machine.

    With `data`, the rows are there, not those of the recipe.

    Raises:
        LoraError: one does not.
    """
    check_model_path(recipe.model.path)
    for value in (recipe.data.train, recipe.data.eval) if data is None else (data,):
        for path in _paths(value):
            check_local_path(path)


def check_training_can_start(recipe: Recipe, *, resume: bool, fresh: bool) -> None:
    """Check the folder of a run, and the inputs of a new one. A resumed run compares them with what it has recorded.

    Workers check nothing: the first of them may have begun the run already.

    Raises:
        LoraError: a run is there or not, against the options; model or rows do not exist; or environment variables of a
            worker cannot be right.
    """
    if is_worker():
        return
    check_start(recipe.output, resume=resume, fresh=fresh)
    if not resume:
        check_inputs_exist(recipe)


def _paths(value: str | float | list[SourceSpec] | None) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [spec.path for spec in value] if isinstance(value, list) else []
