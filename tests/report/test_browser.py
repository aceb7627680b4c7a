"""The page in Chromium: figures are those of the files, markup in texts does nothing; keyboard, themes, print, news.

Without Chromium these tests are skipped; scripts/check installs it where it can.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lora_cli.commands import report as command
from lora_cli.report.watch import make_server
from tests.report.recorded import evaluation, step_record, write_run
from tests.report.test_page import HOSTILE, hostile_run

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
REQUEST = command.ReportRequest(None, False, [], [], False, 0)
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """Errors, dialogs and requests of all pages; each test ends with none."""
    return []


@pytest.fixture
def open_page(browser: Browser, problems: list[str]) -> Iterator[Open]:
    """Return a function that makes the report of runs, or takes an address, and opens it."""
    contexts = []

    def open_(*runs: Path | str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        address = str(runs[0])
        if not address.startswith("http://"):
            folders = [Path(run) for run in runs]
            out = folders[0].parent / "page.html"
            command.report(folders, REQUEST._replace(out=out))
            address = out.as_uri()
            page.on("request", lambda r: problems.append(r.url) if r.url not in (address, "about:blank") else None)
        page.goto(address)
        page.wait_for_selector("body[data-drawn]", timeout=20_000)
        return page

    yield open_
    assert problems == []
    for context in contexts:
        context.close()


def cells(page: Page, caption: str) -> list[list[str]]:
    """Return the texts of a table's rows."""
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    table = page.locator("table", has=page.locator("caption", has_text=caption)).first
    rows: list[list[str]] = table.evaluate(
        "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    return rows


def test_the_figures_are_those_of_the_files(tmp_path: Path, open_page: Open):
    folder = write_run(tmp_path / "a", steps=40)
    (folder / "eval.json").write_text(json.dumps(evaluation(losses=[2.0, 3.0, 4.0, 2.5, 3.5])))
    page = open_page(folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [each for each in records if "eval_loss" in each]
    best = min(evaluations[1:], key=lambda each: each["eval_loss"])
    assert [row[1] for row in cells(page, "Evaluations")] == [f"{each['eval_loss']:.4f}" for each in evaluations]
    steps = [each for each in records if "loss" in each]
    assert [row[:2] for row in cells(page, "Steps")] == [[str(each["step"]), f"{each['loss']:.4f}"] for each in steps]
    summary = page.locator("dl.figures").inner_text()
    assert f"{best['eval_loss']:.4f} at step {best['step']}" in summary
    assert f"{sum(each['tokens'] for each in steps):,}" in summary
    assert cells(page, "lora eval: eval.json")[1][:5] == ["adapter", "1.5000", "4.50", "60.0%", "1.2500 to 1.7500"]
    assert page.locator(".answer", has_text="Paris. (base)").count() == 1
    assert page.locator("mark span:not(.vh)").all_inner_texts() == [" I"]
    assert page.locator("#chart-loss svg path").count() > 3, "it is drawn"


def test_markup_in_texts_does_nothing(tmp_path: Path, open_page: Open):
    page = open_page(hostile_run(tmp_path / "<img src=y onerror=alert(4)>run"))
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 3
    shown = HOSTILE.partition("\u2028")[0]
    assert shown in page.locator(".answer .text").first.inner_text()
    assert "<img src=y" in page.title()


def test_nothing_but_the_scripts_of_the_page_may_run(tmp_path: Path, open_page: Open, problems: list[str]):
    """Even if a text were written into the page as it is."""
    page = open_page(write_run(tmp_path / "a"))
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.ran = 1\">')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    assert len(problems) == 1, "the browser tells that the policy forbids it"
    problems.clear()


def test_the_keyboard_reads_every_step(tmp_path: Path, open_page: Open):
    page = open_page(write_run(tmp_path / "a", steps=40))
    chart = page.get_by_role("slider", name="Loss by step")
    chart.focus()
    page.keyboard.press("End")
    expected = f"step 40: {round(step_record(40, steps=40)['loss'], 4):g}, held-out rows 1.39"
    assert chart.get_attribute("aria-valuetext") == expected
    assert page.locator("[data-reading=loss]").inner_text() == expected
    page.keyboard.press("ArrowLeft")
    assert chart.get_attribute("aria-valuenow") == "39"
    assert page.locator("#chart-grad_norm").get_attribute("aria-valuenow") == "39", "all charts have one cursor"
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    assert chart.get_attribute("aria-valuenow") == "4", "a tenth of 41 steps, as the base is step 0"
    page.keyboard.press("Escape")
    assert chart.get_attribute("aria-valuetext") == "no step chosen"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "chart-learning_rate"


def test_every_part_has_a_name_for_a_screen_reader(tmp_path: Path, open_page: Open):
    page = open_page(write_run(tmp_path / "a"))
    for part in ("Summary", "Curves", "Rows", "Label mask", "Target coverage", "Answers", "Adapter", "Environment"):
        assert page.get_by_role("heading", name=part, exact=part != "Summary").count() == 1, part
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, button, [role], table, pre[tabindex]')].filter(each =>
            !each.getAttribute('aria-label') && !each.labels?.length && !each.caption && !each.textContent.trim()
            && !each.closest('svg')).map(each => each.outerHTML)"""
    )
    assert unnamed == []
    assert page.get_by_role("slider", name="Loss by step").count() == 1
    assert "lowest" in page.locator("#about-loss").inner_text()


def test_the_range_of_steps(tmp_path: Path, open_page: Open):
    page = open_page(write_run(tmp_path / "a", steps=40))
    page.get_by_label("from step").fill("10")
    page.get_by_label("to step").fill("20")
    page.keyboard.press("Tab")
    chart = page.locator("#chart-loss")
    assert [chart.get_attribute(f"aria-value{end}") for end in ("min", "max")] == ["10", "20"]
    chart.focus()
    page.keyboard.press("End")
    assert chart.get_attribute("aria-valuenow") == "20"
    page.get_by_role("button", name="all steps").click()
    assert chart.get_attribute("aria-valuemax") == "40"


def axis_labels(page: Page, chart: str) -> list[list[str]]:
    """Return the texts of the axes of a chart: x, then y."""
    labels: list[list[str]] = page.locator(f"#chart-{chart} .role-axis-label").evaluate_all(
        "axes => axes.map(axis => [...axis.querySelectorAll('text')].map(each => each.textContent))"
    )
    return labels


def test_axes_of_few_and_of_equal_values(tmp_path: Path, open_page: Open):
    folder = write_run(tmp_path / "a", steps=3, every=0)
    records = [{**step_record(step, steps=3), "learning_rate": 2e-4} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    page = open_page(folder)
    assert axis_labels(page, "learning_rate") == [["1", "2", "3"], ["0.0002"]]
    assert len(set(axis_labels(page, "loss")[1])) > 2


def test_the_range_of_steps_is_that_of_the_losses_too(tmp_path: Path, open_page: Open):
    folder = write_run(tmp_path / "a", steps=40, every=10)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 35, "eval_loss": 1e6}) + "\n")
    page = open_page(folder)
    assert "1,000,000" in axis_labels(page, "loss")[1]
    page.get_by_label("to step").fill("20")
    page.keyboard.press("Enter")
    assert max(map(float, axis_labels(page, "loss")[1])) < 5


def test_ten_thousand_steps_do_not_lag(tmp_path: Path, open_page: Open):
    page = open_page(*(write_run(tmp_path / name, steps=10_000, every=500) for name in "abc"))
    drawn = page.evaluate("performance.now()")
    chart = page.locator("#chart-loss")
    page.evaluate(
        """() => { window.spent = []; const chart = document.getElementById('chart-loss');
        chart.addEventListener('pointermove', () => { const start = performance.now();
          requestAnimationFrame(() => window.spent.push(performance.now() - start)); }); }"""
    )
    box = chart.bounding_box()
    assert box is not None
    for number in range(40):
        page.mouse.move(box["x"] + 80 + number * 20, box["y"] + 60)
    spent = sorted(page.evaluate("window.spent"))
    assert drawn < 15_000
    assert spent[len(spent) // 2] < 100, "ms from a pointer's move to the next frame"
    pressed = sorted(page.evaluate(PRESS_KEYS))
    assert pressed[len(pressed) // 2] < 150, "ms until the charts have moved their cursors"
    assert page.evaluate("document.querySelector('#chart-loss svg').outerHTML.length") < 500_000


PRESS_KEYS = """async () => {
  const chart = document.getElementById('chart-loss'), spent = [];
  for (let i = 0; i < 9; i++) {
    const start = performance.now();
    chart.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }));
    await new Promise((done) => setTimeout(done, 0));
    spent.push(performance.now() - start);
  }
  return spent;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_themes(tmp_path: Path, open_page: Open, scheme: str):
    page = open_page(write_run(tmp_path / "a"), color_scheme=scheme)
    ratios = page.evaluate(CONTRAST)
    assert min(ratios.values()) >= 4.5, ratios
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (
        scheme == "light"
    )


# The contrast of text with its background, by WCAG 2.1: at least 4.5.
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (each) => {
    for (; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(color)) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = {};
  for (const selector of ['body', '.muted', '.missing', 'mark', 'dt', 'thead th', '.state', '#chart-loss svg text']) {
    const each = document.querySelector(selector), style = getComputedStyle(each);
    const [a, b] = [light(each.closest('svg') ? style.fill : style.color), light(ground(each))].sort((x, y) => y - x);
    found[selector] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


def test_a_narrow_screen_needs_no_scrolling_to_the_side(tmp_path: Path, open_page: Open):
    page = open_page(hostile_run(tmp_path / ("long-name" * 12)), viewport={"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_paper_has_all_parts(tmp_path: Path, open_page: Open):
    page = open_page(write_run(tmp_path / "a"), color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#range").is_hidden()
    recipe = page.locator("#part-recipe-0 pre").first
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert recipe.is_visible()
    assert len(page.pdf()) > 10_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert recipe.is_hidden()


def test_several_runs_are_laid_over_each_other(tmp_path: Path, open_page: Open):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=20, learning_rate=1e-4)
    (first / "eval.json").write_text(json.dumps(evaluation(losses=[3.0, 3.5, 4.0, 4.5, 5.0, 5.5])))
    (second / "eval.json").write_text(json.dumps(evaluation(losses=[2.0, 2.5, 3.0, 3.5, 4.0, 4.5])))
    page = open_page(first, second)
    assert cells(page, "Keys of the recipes") == [["training.learning_rate", "0.002", "0.0001"]]
    final = {row[0]: row for row in cells(page, "Final figures")}
    assert final["b"][7] == "+0.5000 (0.5000 to 0.5000)", "each row is better by 1 nat over its 2 units"
    assert final["a"][7] == "–"
    page.locator("#chart-loss").focus()
    page.keyboard.press("End")
    assert page.locator("#chart-loss").get_attribute("aria-valuetext").startswith("step 40: a: ")  # type: ignore[union-attr]
    colors = page.evaluate(
        """() => new Set([...document.querySelectorAll('#chart-loss .mark-line path')].map(
            (each) => each.getAttribute('stroke'))).size"""
    )
    assert colors == 2


@pytest.mark.parametrize("kind", ["no steps", "no files", "one step", "failed"])
def test_a_run_with_little_in_it(tmp_path: Path, open_page: Open, kind: str):
    folder = write_run(tmp_path / "a", steps=1 if kind == "one step" else 0, every=0, finished=False)
    if kind == "no files":
        for name in ("metrics.jsonl", "manifest.json", "recipe.yaml"):
            (folder / name).unlink()
    if kind == "failed":
        (folder / "failed.json").write_text(json.dumps({"error": "the disk is full", "hint": None}))
    page = open_page(folder)
    assert page.locator(".note li").count() >= 1
    assert (page.get_by_role("slider").count() > 0) == (kind == "one step")
    assert page.locator("#chart-loss .mark-symbol.role-mark path").count() == (1 if kind == "one step" else 0)
    assert page.get_by_text("the disk is full").count() == (1 if kind == "failed" else 0)


def append_steps(folder: Path, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a") as log:
        log.write("".join(json.dumps(step_record(step, steps=20)) + "\n" for step in range(first, last + 1)))


def test_the_page_follows_a_run(tmp_path: Path, open_page: Open):
    folder = write_run(tmp_path / "a", steps=10, finished=False, changes={"steps": 20})
    server = make_server(command.make_watch([folder], REQUEST), port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        page = open_page(server.address)
        page.locator("#part-recipe-0 summary").click()
        append_steps(folder, 11, 14)
        page.get_by_text("stopped at step 14 of 20").first.wait_for(timeout=15_000)
        focused = "document.activeElement.closest('details')?.id"
        assert page.evaluate(focused) == "part-recipe-0", "the keyboard stays where it is"
        page.get_by_label("from step").fill("3")
        append_steps(folder, 15, 15)
        page.get_by_text("stopped at step 15 of 20").first.wait_for(timeout=15_000)
        assert page.get_by_label("from step").input_value() == "3", "what is typed stays"
        page.locator("#chart-loss").focus()
        page.keyboard.press("End")
        assert page.locator("#chart-loss").get_attribute("aria-valuenow") == "15"
        assert page.locator("#part-recipe-0").get_attribute("open") is not None, "what was opened stays open"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
