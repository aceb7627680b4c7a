"""One file a subcommand: its whole story, readable from top to bottom."""
