"""The page without a browser: figures of the files, text of rows and names is escaped, only its own scripts may run."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lora_cli.report.compare import recipe_differences
from lora_cli.report.page import Report, ReportedRun, render_page, script_data, script_json
from lora_cli.report.recorded_run import read_run
from lora_cli.report.verdicts import find_verdicts
from tests.report.recorded import ADAPTER, evaluation, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}<!--\u2028\ud800"


class Elements(HTMLParser):
    """Collects the names of the elements, and the texts of the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def render(*folders: Path, verdicts: Any = ()) -> str:
    runs = [read_run(folder, name=folder.name, checkpoints=[]) for folder in folders]
    return render_page(Report([ReportedRun(run, verdicts=verdicts) for run in runs], {}, "now"), library="lib()")


def hostile_run(folder: Path) -> Path:
    """Write a run with markup in every text."""
    changes = {
        "recipe_file": HOSTILE,
        "base": {"path": HOSTILE},
        "command": [HOSTILE],
        "versions": {HOSTILE: HOSTILE, "lora-cli": "0"},
        "performance": {HOSTILE: HOSTILE},
        "label_mask": [{"where": HOSTILE, "tokens": [HOSTILE, HOSTILE], "loss": [[1, 2]], "left_out": 0}],
        "coverage": {"kinds": [{"kind": HOSTILE, "matched": 1, "layers": 1}], "notes": [HOSTILE]},
    }
    write_run(folder, changes=changes)
    (folder / "recipe.yaml").write_text(json.dumps({"model": {"path": HOSTILE}}))
    (folder / "eval.json").write_text(json.dumps(evaluation(losses=[1.0] * 8, text=HOSTILE)))
    answers = [{"step": step, "where": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE} for step in (0, 40)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    (folder / "failed.json").write_text(json.dumps({"error": HOSTILE, "hint": HOSTILE}))
    return folder


def test_texts_are_no_elements_and_no_scripts(tmp_path: Path):
    name = "<b onclick=alert(3)>run"
    plain, hostile = Elements(render(write_run(tmp_path / "plain"))), Elements(render(hostile_run(tmp_path / name)))
    assert len(hostile.scripts) == 3
    assert "img" not in hostile.names
    assert set(hostile.names) <= {*plain.names, "article", "h4", "h5"}
    assert json.loads(hostile.scripts[0])["runs"][0]["name"] == name
    assert hostile.scripts[1:] == plain.scripts[1:]


def test_each_part_has_an_id_of_its_own(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a"), name="a", checkpoints=[])
    kind = {"kind": "q_proj", "modules": 2, "rank": "4", "norm": 1.0, "effective_rank": 2.0, "spectrum": [1.0, 0.5]}
    spectra = [{**kind, "energy_ranks": {"0.90": 2.0, "0.95": 3.0, "0.99": 4.0}}]
    page = render_page(Report([ReportedRun(run, spectra), ReportedRun(run, spectra)], {}, "now"), library="")
    ids = re.findall(r' id="([^"]*)"', page)
    assert sorted(ids) == sorted(set(ids))
    assert {"spectrum-1", "part-spectrum-1", "lengths-0"} <= set(ids)


def test_only_the_two_scripts_of_the_page_may_run(tmp_path: Path):
    page = render(write_run(tmp_path / "a"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = re.findall(r"&#39;sha256-([^&]*)&#39;", policy[1])
    scripts = Elements(page).scripts[1:]
    assert allowed == [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert "connect-src" not in policy[1]
    assert not re.search(r'(?:src|href)="(?!#)', page), "nothing is loaded from elsewhere"


def test_the_data_of_the_curves_are_the_numbers_of_the_log(tmp_path: Path):
    folder = write_run(tmp_path / "a", steps=25, every=5)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [each for each in records if "loss" in each]
    data = json.loads(Elements(render(folder)).scripts[0])["runs"][0]
    assert data["columns"]["loss"] == [each["loss"] for each in steps]
    assert data["columns"]["grad_norm"] == [each["grad_norm"] for each in steps]
    assert data["columns"]["learning_rate"] == [each["learning_rate"] for each in steps]
    assert data["columns"]["tokens_per_second"] == [each["tokens"] / each["seconds"] for each in steps]
    assert data["columns"]["peak_memory"] == [each["peak_memory"] / 2**30 for each in steps]
    assert data["evaluations"] == [[each["step"], each["eval_loss"]] for each in records if "eval_loss" in each]


def test_records_of_earlier_versions_lack_columns(tmp_path: Path):
    folder = write_run(tmp_path / "a", changes={"coverage": None, "label_mask": None, "machine": None})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("peak_memory", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = read_run(folder, name="a", checkpoints=[])
    assert "peak_memory" not in script_data(Report([ReportedRun(run)], {}, "now"))["charts"]
    page = render(folder)
    assert "not recorded" in page
    assert "The manifest has no target coverage" in page
    assert "No rows with their label mask are recorded" in page


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path):
    folder = write_run(tmp_path / "a", steps=2, every=0)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "grad_norm": 1e400}\n{"step": 2, "loss": "high"}\n'
    )
    data = json.loads(Elements(render(folder)).scripts[0])
    assert data["runs"][0]["columns"]["loss"] == [None, None]
    assert data["charts"] == {}


def test_numbers_that_are_too_large_are_left_out(tmp_path: Path):
    folder = write_run(tmp_path / "a", steps=2, every=0)
    record = {"step": 1, "loss": 10**400, "tokens": 5, "seconds": 1e-320, "peak_memory": -(10**30)}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert json.loads(Elements(render(folder)).scripts[0])["charts"] == {}


def test_json_cannot_end_its_script():
    assert json.loads(str(script_json({"a": HOSTILE}))) == {"a": HOSTILE}
    assert not set(str(script_json(HOSTILE))) & set("<>&\u2028")


def test_control_characters_are_shown(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    (folder / "answers.jsonl").write_text(json.dumps({"step": 1, "answer": "a\x00b\x1b[1m\n\x7f"}) + "\n")
    page = render(folder)
    assert "a\u2400b\u241b[1m\n\u2421" in page
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", page)


def test_twelve_runs_are_told_apart_without_color_alone(tmp_path: Path):
    runs = [
        ReportedRun(read_run(write_run(tmp_path / str(n), steps=1), name=str(n), checkpoints=[])) for n in range(12)
    ]
    encoding = script_data(Report(runs, {}, "now"))["charts"]["loss"]["layer"][0]["encoding"]
    colors, dashes = (encoding[channel]["scale"]["range"] for channel in ("color", "strokeDash"))
    assert len({(color, tuple(dash)) for color, dash in zip(colors, dashes, strict=True)}) == 12


def test_a_bar_hides_no_bar_of_the_other_split(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a"), name="a", checkpoints=[])
    bars = script_data(Report([ReportedRun(run)], {}, "now"))["static"]["lengths-0"]["data"]["values"]
    assert {bar["split"] for bar in bars} == {"train", "eval"}
    edges = sorted((bar["from"], bar["to"]) for bar in bars)
    assert all(first[1] <= second[0] for first, second in pairwise(edges))


def test_recipes_are_compared_by_key(tmp_path: Path):
    folders = write_run(tmp_path / "a"), write_run(tmp_path / "b", learning_rate=1e-4)
    table = recipe_differences([read_run(folder, name=folder.name, checkpoints=[]) for folder in folders])
    assert table is not None
    assert table.rows == [("training.learning_rate", "0.002", "0.0001")]
    assert table.notes == ["3 other keys are equal"]


def write_verdicts(folder: Path, adapter: str) -> None:
    for name, content in {
        "merged/merge.json": {"adapter": adapter, "base": "base", "tensors": 9, "changed": 3, "logits": None},
        "gguf/export.json": {
            "source": {"adapter": adapter}, "format": "gguf", "quantize": "q8_0", "files": {".": {"bytes": 9}},
            "checks": [{"name": "distribution", "passed": True, "found": "KL 1e-6 nats"}],
        },
        "model.export.json": {"source": {"adapter": adapter}, "format": "gguf", "checks": []},
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("named", [False, True])
def test_merges_and_exports_are_found_by_the_hash_of_the_adapter(tmp_path: Path, named: bool):
    folder = write_run(tmp_path / "runs" / "a")
    place = tmp_path / "elsewhere" if named else tmp_path / "runs"
    write_verdicts(place, ADAPTER)
    write_verdicts(place / "others", "cd" * 32)
    (place / "loop").symlink_to(place / "loop")
    (place / "link").symlink_to("x" * 300)
    assert find_verdicts(folder, None, [place] if named else []) == []
    found = find_verdicts(folder, ADAPTER, [place] if named else [])
    assert [each.path.relative_to(place).as_posix() for each in found] == [
        "gguf/export.json", "merged/merge.json", "model.export.json"
    ]  # fmt: skip
    page = render(folder, verdicts=found)
    assert "KL 1e-6 nats" in page
    assert "equals PEFT&#39;s merge" in page
