"""Run the fault campaigns and print a table of what was tried, survived and lost: the program behind scripts/faults."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults import campaign as frame
from tests.faults.campaign import Campaign
from tests.faults.forked_lora import import_libraries

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
import_libraries()  # before other imports, as it silences warnings that some libraries print when they are imported

from tests.faults.campaigns import campaigns  # noqa: E402
from tests.faults.table import MARKS, Row, render, table_rows, write_table  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    """Run campaigns as the command line says; return 1 if a case failed, else 0."""
    options = _parse(arguments)
    table = campaigns(quick=options.quick)
    chosen = {key: campaign for key, campaign in table.items() if key in (options.only or table)}
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3), "big")
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        for row in _run(chosen, options.scratch or Path(temporary), options, seed):
            rows.append(row)
            _print_failures(row, seed, quick=options.quick)
            if options.markdown:
                write_table(options.markdown, table_rows([row], seed))
    sys.stdout.write(render(table_rows(rows, seed)))
    return int(any(result.outcome.failed for row in rows for result in row.results))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    table = campaigns(quick=False)
    kinds = "\n".join(f"  {key:12} {campaign.title}" for key, campaign in table.items())
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=__doc__, epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, metavar="N", help="time for all kinds; default: complete campaigns")
    parser.add_argument("--cases", type=int, metavar="N", help="cases of each kind, at most")
    parser.add_argument("--quick", action="store_true", help="only a few commands, which are prepared in seconds")
    parser.add_argument("--seed", type=int, metavar="S", help="of the cases; default: a random one, which is printed")
    parser.add_argument("--only", action="append", choices=[*table], metavar="KIND", help="may be repeated")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="only this case of one kind and seed")
    parser.add_argument("--workers", type=int, default=CORES, metavar="N", help="cases at once; default: all cores")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help=f"put the rows into its table, between {' and '.join(MARKS)}; the project's is docs/faults.md",
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="keep prepared inputs here, and use them again")
    options = parser.parse_args(arguments)
    if options.case is not None and (options.seed is None or len(options.only or ()) != 1):
        parser.error("--case needs --seed and one --only")
    return options


def _run(chosen: dict[str, Campaign], scratch: Path, options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Run the campaigns one after the other; each gets its share of the time that is left."""
    begin = time.monotonic()
    waiting = sum(campaign.share for campaign in chosen.values())
    for key, campaign in chosen.items():
        start = time.monotonic()
        until = None
        if options.minutes is not None:
            left = options.minutes * 60 - (start - begin)
            until = start + left * campaign.share / waiting
        waiting -= campaign.share
        prepared, done = scratch / campaign.inputs, scratch / f"{campaign.inputs}.done"
        if not done.exists():
            _say(f"{campaign.title}: preparing")
            frame.prepare(campaign, prepared)
            done.touch()
        counts = [count for count in (options.cases, campaign.count) if count is not None]
        row = Row(key, campaign.title, [])
        for result in frame.run_campaign(
            campaign, prepared, seed=seed, count=min(counts, default=None), only=options.case,
            workers=options.workers, until=until,
        ):  # fmt: skip
            row.results.append(result)
            failed = sum(result.outcome.failed for result in row.results)
            _say(f"{campaign.title}: {row.tried:,} tried, {failed:,} failed")
        yield row


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def _print_failures(row: Row, seed: int, *, quick: bool) -> None:
    _say("")
    for number, outcome in row.results:
        if outcome.failed:
            sys.stdout.write(
                f"{outcome.verdict}: {outcome.fault}\n"
                + "".join(f"    {line}\n" for line in outcome.detail.splitlines())
                + f"    scripts/faults{' --quick' * quick} --only {row.key} --seed {seed} --case {number}\n"
            )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
