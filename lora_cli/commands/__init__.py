"""The subcommands of `lora`: one file each, readable from top to bottom."""
