"""`lora env`."""

from lora_cli.cli.app import app
from lora_cli.cli.options import Json, check_json_file, write_record
from lora_cli.run import console


@app.command(examples=["lora env", "lora env --json env.json"])
def env(json: Json = None) -> None:
    """Print a report for issues: machine, libraries and settings, without secrets, names and home paths."""
    from lora_cli.commands import env as command

    check_json_file(json)
    with console.loading_message():
        report = command.collect()
    command.show(report)
    write_record(json, report)
