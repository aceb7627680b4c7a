"""`lora --version`: the versions of lora and of the libraries that do its work, without importing them. No torch."""

from lora_cli.run import console
from lora_cli.run.versions import version_of

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def show_versions() -> None:
    """Print a line for lora, and for each library."""
    console.out.print(f"lora {version_of('lora-cli') or '(not installed as a package)'}")
    for name in LIBRARIES:
        console.out.print(f"{name} {version_of(name) or '(not installed)'}")
