"""The fixtures of the command tests: a working folder with inputs, a finished run, and `lora` to run commands."""

from tests.commands.conftest import finished_run, lora, recipe, trained_run, workdir

__all__ = ["finished_run", "lora", "recipe", "trained_run", "workdir"]
