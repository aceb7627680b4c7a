"""Entry point of `python -m lora_cli`, which the launcher uses to start several processes."""

from lora_cli.cli import main

main()
