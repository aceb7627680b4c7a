"""`lora report` and `runs`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.app import app
from lora_cli.cli.options import Json, check_json_file, target_argument, write_record
from lora_cli.errors import LoraError
from lora_cli.run.output_path import STDOUT


@app.command(examples=["lora report runs/quickstart --open", "lora report runs/a runs/b --out compare.html"])
def report(
    runs: Annotated[list[Path], target_argument("RUN...", "Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page, - for stdout; default: report.html in the run, or here."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="JSON of lora eval that is in another place than the run."),
    ] = None,
    verdicts: Annotated[
        list[Path] | None,
        typer.Option("--verdict", metavar="PATH", help="A merge or export in another place than beside the run."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine, and follow the runs.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Of --watch; 0: a free one.")] = 0,
    json: Json = None,
) -> None:
    """Make one HTML page on a run, or on several side by side: curves, rows, answers, adapter, recipe."""
    check_json_file(json)
    if watch and out is not None:
        raise LoraError("--watch serves the page, and writes no file", hint="leave out --out or --watch")
    if watch and json is not None:
        raise LoraError("--json has nothing to print with --watch", hint="leave one out")
    if out == STDOUT and (open_page or json is not None):
        option = "--open needs a file" if open_page else "--json prints to stdout too"
        raise LoraError(f"--out - prints the page, and {option}", hint="leave one out")
    if port and not watch:
        raise LoraError("--port is for --watch", hint="leave it out")
    for file in evaluations or []:
        if not file.is_file():
            raise LoraError(f"--eval {file} is not a file", hint="write one with lora eval RUN --json FILE")
    for place in verdicts or []:
        if not place.exists():
            raise LoraError(f"--verdict {place} does not exist", hint="give the output of lora merge or lora export")
    from lora_cli.commands import report as command

    request = command.ReportRequest(out, open_page, evaluations or [], verdicts or [], watch, port)
    write_record(json, command.report(runs, request))


@app.command("runs", examples=["lora runs", "lora runs experiments --json"])
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the runs are.")] = Path("runs"),
    json: Json = None,
) -> None:
    """List the runs in a folder: state, losses, size, age and recipe."""
    check_json_file(json)
    from lora_cli.commands.runs import runs as command

    write_record(json, command(folder))
