"""`lora init`: the recipes that come with the package, and a copy of one to start from. No torch."""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run import atomic, console


def recipes() -> dict[str, str]:
    """The text of each recipe by its name."""
    folder = files("lora_cli") / "configs"
    texts = {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in folder.iterdir()}
    return dict(sorted(texts.items()))


def show_recipes() -> None:
    """Print the name and the first line of each recipe."""
    texts = recipes()
    width = max(map(len, texts))
    for name, text in texts.items():
        console.out.print(f"{name:<{width}}  {text.splitlines()[0].removeprefix('# ')}")
    console.info("lora init NAME writes one into this folder")


def write_recipe(name: str) -> None:
    """Write the recipe `name` into the working folder.

    Raises:
        LoraError: there is no such recipe, or a file of its name is there.
    """
    texts = recipes()
    name = name.removesuffix(".yaml")
    if name not in texts:
        close = get_close_matches(name, texts, n=1)
        raise LoraError(
            f"there is no recipe {name!r}",
            hint=f"did you mean {close[0]}?" if close else "`lora init` lists them",
        )
    path = Path(f"{name}.yaml")
    if path.exists():
        raise LoraError(f"{path} exists", hint="move it away, or work on it as it is")
    atomic.write_text(path, texts[name])
    console.out.print(str(path))
    console.info(f"next: put your model and rows into it; lora check {path}; lora train {path}")
