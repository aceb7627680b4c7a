"""The same furnished folder and the same way to type commands as in the tests of the commands."""

from tests.commands.conftest import finished, lora, place, recipe, trained

__all__ = ["finished", "lora", "place", "recipe", "trained"]
