"""`lora report`: one HTML page on runs, of what their folders have recorded; with --watch, while they train."""

import os
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.errors import LoraError
from lora_cli.report.chart_library import chart_library
from lora_cli.report.page import Report, ReportedRun, render_page, render_parts, script_data
from lora_cli.report.recorded_run import Json, RecordedRun, check_is_run, read_measurement, read_run
from lora_cli.report.verdicts import find_verdicts
from lora_cli.report.watch import Snapshot, Watch, make_server
from lora_cli.run import atomic, console
from lora_cli.run.folder import EXPORT_VERDICT, PAGE, find_adapter_folder
from lora_cli.run.output_path import STDOUT
from lora_cli.run.read_file import open_regular
from lora_cli.run.run_lock import user_of_run
from lora_cli.run.run_results import PAGE_MARK
from lora_cli.run.shell import shell_path
from lora_cli.run.signals import stop_request
from lora_cli.setup.row_losses import row_loss_intervals
from lora_cli.training.checkpoint_folders import checkpoint_steps

TRAINING = "There is no adapter: a run writes it at its end."
WATCHED = "The adapter's spectrum is not computed with --watch: make the report without it."


class ReportRequest(NamedTuple):
    """Options of the command line."""

    out: Path | None
    open_page: bool
    evaluations: Sequence[Path]  # JSON files of `lora eval` outside the run folders
    verdicts: Sequence[Path]  # outputs of `lora merge` and `lora export` in other places
    watch: bool
    port: int


def report(folders: Sequence[Path], request: ReportRequest) -> dict[str, Any]:
    """Write the page on the runs in `folders`, print and return its path; or serve it.

    Raises:
        LoraError: a folder is no run, the page would replace another file, or the chart library is missing.
    """
    for folder in folders:
        check_is_run(folder)
    if request.watch:
        _serve(folders, request)
        return {}
    out = request.out or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    if out != STDOUT:
        _check_out(out)
    library = chart_library(info=console.info)
    content = _read(folders, request, spectra=True)
    _tell_empty_places(content, request.verdicts)
    page = render_page(content, library=library).encode("utf-8", errors="replace")
    if out == STDOUT:
        sys.stdout.buffer.write(page)
        return {}
    atomic.write_bytes(out, page)
    console.out.print(str(out))
    if request.open_page:
        _open(out.absolute().as_uri())
    return {"page": out}


def _open(address: str) -> None:
    if not webbrowser.open(address):
        console.info(f"note: no browser was found: open {address}")


def _read(folders: Sequence[Path], request: ReportRequest, *, spectra: bool) -> Report:
    """Read all that the page shows; `spectra` imports torch, if a run has an adapter."""
    names = _names(folders)
    runs = []
    for folder, name in zip(folders, names, strict=True):
        run = read_run(folder, name=name, checkpoints=checkpoint_steps(folder / "checkpoints"))
        runs.append(run)
    runs = _with_evaluations(runs, request.evaluations)
    reported = []
    for run in runs:
        found, reason = _spectra(run) if spectra else ([], WATCHED)
        verdicts = find_verdicts(run.folder, run.adapter, request.verdicts)
        reported.append(ReportedRun(run, found, reason, verdicts))
    return Report(reported, row_loss_intervals(runs), _last_change(runs))


def _last_change(runs: Sequence[RecordedRun]) -> str:
    """Return when the files of the runs changed last. The page has no other time: equal files give an equal page."""
    times = []
    for run in runs:
        for name in ("metrics.jsonl", "answers.jsonl", "manifest.json", *(each.file for each in run.measurements)):
            with suppress(OSError):
                times.append(os.stat(run.folder / name).st_mtime)
    newest = datetime.fromtimestamp(max(times, default=0)).astimezone()
    return newest.strftime("%Y-%m-%d %H:%M:%S %Z") if times else "at an unknown time"


def _with_evaluations(runs: list[RecordedRun], files: Sequence[Path]) -> list[RecordedRun]:
    """Return the runs with the results of `lora eval` in `files`, each at the runs whose adapter it measured.

    Raises:
        LoraError: a file is no such result, or measured the adapter of no run.
    """
    for file in files:
        found = [(run, read_measurement(file, run.adapter)) for run in runs]
        if any(measured is None for _, measured in found):
            raise LoraError(f"--eval {file} is not a result of lora eval", hint="write one: lora eval RUN --json FILE")
        # A file of an earlier version does not tell what it measured: it belongs to the only run.
        fitting = {run.name: m for run, m in found if m and (m.of_adapter or (m.of_adapter is None and len(runs) == 1))}
        if not fitting:
            raise LoraError(f"--eval {file} measured none of these runs' adapters", hint="measure them again")
        runs = [
            run._replace(measurements=[*run.measurements, fitting[run.name]]) if run.name in fitting else run
            for run in runs
        ]
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the names of runs: of their folders, or where these are equal, their paths.

    Raises:
        LoraError: a run is given twice, as it is or by a link.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise LoraError(f"{folder} is given twice", hint="give each run once")
    names = [place.name for place in places]
    return [name if names.count(name) == 1 else str(folder) for folder, name in zip(folders, names, strict=True)]


def _spectra(run: RecordedRun) -> tuple[list[Json], str]:
    """Return the spectra of a run's adapter, or none and the reason."""
    folder = find_adapter_folder(run.folder / "adapter")
    if folder is None:
        return [], TRAINING
    with console.loading_libraries():
        from lora_cli.merging.spectrum import spectra_by_kind
        from lora_cli.model.adapter_files import open_adapter
    try:
        found = spectra_by_kind(open_adapter(folder))
    except LoraError as reason:
        return [], f"The adapter has no spectrum: {reason.message}"
    return found, "" if found else "Every update of the adapter is zero: it was never trained."


def _tell_empty_places(content: Report, places: Sequence[Path]) -> None:
    """Tell of --verdict what has no merge or export of the runs' adapters."""
    found = [verdict.path.resolve() for each in content.runs for verdict in each.verdicts]
    for place in places:
        inside = (path == place.resolve() or place.resolve() in path.parents for path in found)
        if not (any(inside) or place.resolve().with_suffix(f".{EXPORT_VERDICT}") in found):
            console.info(f"note: --verdict {place} has no merge or export of the adapter of these runs")


def _check_out(out: Path) -> None:
    """Raise if the page cannot be written to `out`, or would replace a file that is no report.

    Raises:
        LoraError: the reason.
    """
    if not out.absolute().parent.is_dir():
        raise LoraError(f"--out {out}: there is no folder {out.parent}", hint="make it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise LoraError(f"{out} cannot be written: no permission in {out.parent}", hint="write --out FILE.html")
    if not os.path.lexists(out):
        return
    if out.is_dir():
        raise LoraError(f"--out {out} is a folder", hint=f"write --out {shell_path(out / PAGE)}")
    with open_regular(out, hint="name another file") as file:
        if file.read(len(PAGE_MARK)) != PAGE_MARK.encode():
            raise LoraError(f"--out {out} exists, and is no report", hint="name another file")


def _serve(folders: Sequence[Path], request: ReportRequest) -> None:
    """Serve the page until a signal ends the command."""
    server = make_server(make_watch(folders, request), port=request.port)
    console.out.print(server.address)
    console.info("Ctrl-C ends it; only this machine can open the address")
    if request.open_page:
        _open(server.address)
    with server, stop_request() as stop:
        server.timeout = 0.2
        while not stop.is_set():
            server.handle_request()


def make_watch(folders: Sequence[Path], request: ReportRequest) -> Watch:
    """Return what a server of the page on the runs in `folders` shows.

    Raises:
        LoraError: the chart library is missing.
    """
    library = chart_library(info=console.info)

    def snapshot() -> Snapshot:
        version = _version(folders)
        content = _read(folders, request, spectra=False)
        news: dict[str, object] = {
            "data": script_data(content),
            "parts": render_parts(content),
            "changed": content.changed,
        }
        return Snapshot(version, render_page(content, library=library, live=True), news)

    return Watch(lambda: _version(folders), snapshot)


def _version(folders: Sequence[Path]) -> str:
    """Return what changes when the runs change, by the sizes and times of their files and the processes that train."""
    marks = []
    for folder in folders:
        for name in (".", "metrics.jsonl", "answers.jsonl", "manifest.json", "checkpoints"):
            try:
                found = os.stat(folder / name)
            except OSError:
                continue
            marks.append(f"{found.st_size}-{found.st_mtime_ns}")
        marks.append(str(user_of_run(folder)))  # a process that is killed changes no file
    return ".".join(marks)
