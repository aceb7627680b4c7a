"""`lora init`: list the example recipes of the package, or copy one as a starting point. No torch."""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from lora_cli.errors import LoraError
from lora_cli.run import atomic, console
from lora_cli.run.shell import shell_path


def recipes() -> dict[str, str]:
    """Return the text of each recipe by name."""
    folder = files("lora_cli") / "configs"
    texts = {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in folder.iterdir()}
    return dict(sorted(texts.items()))


def show_recipes() -> list[dict[str, str]]:
    """Print the name and the first line of each recipe; return them for JSON."""
    texts = recipes()
    width = max(map(len, texts))
    for name, text in texts.items():
        console.out.print(f"{name:<{width}}  {_summary(text)}")
    console.info("lora init NAME writes one into this folder")
    return [{"name": name, "summary": _summary(text)} for name, text in texts.items()]


def _summary(text: str) -> str:
    return text.splitlines()[0].removeprefix("# ")


def write_recipe(name: str) -> Path:
    """Write the recipe `name` into the working folder; return its path.

    Raises:
        LoraError: the recipe does not exist, or the working folder contains a file with its name.
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
    try:
        with atomic.file(path) as temporary:
            temporary.write_text(texts[name], encoding="utf-8")
    except FileExistsError:
        raise LoraError(f"{path} exists", hint="move it away, or edit it") from None
    console.out.print(str(path))
    console.info(f"next: put your model and rows into it; lora check {shell_path(path)}; lora train {shell_path(path)}")
    return path
