"""`python -m lora_cli`, as the launcher of several processes starts it."""

from lora_cli.cli import main

main()
