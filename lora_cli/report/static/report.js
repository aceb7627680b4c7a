// The script of a report: draws the curves from the page's data, and moves one cursor through all of them.
"use strict";
(() => {
  const LIMIT = 2000; // points of a line that are drawn: more would be several in one pixel
  // ast: no code is made from text, which the page's policy forbids. logLevel: errors alone; an empty cursor is none.
  const OPTIONS = { renderer: "svg", actions: false, ast: true, tooltip: false, defaultStyle: false, logLevel: 1 };
  let data = JSON.parse(document.getElementById("data").textContent);
  const charts = [...document.querySelectorAll("[data-chart]")];
  const low = document.getElementById("low"), high = document.getElementById("high");
  const smooth = document.getElementById("smooth");
  const views = new Map();
  let steps = [], cursor = null, range = null; // range: [first, last step], null for all

  function readSteps() {
    const all = new Set();
    for (const run of data.runs) {
      for (const step of run.columns.step) all.add(step);
      for (const [step] of run.evaluations) all.add(step);
    }
    steps = [...all].sort((a, b) => a - b);
  }
  const shown = () => range ?? [Math.min(steps[0] ?? 0, 1), Math.max(steps[steps.length - 1] ?? 1, 2)];

  // The index of the first element of `sorted` that is not below `value`.
  function find(sorted, value) {
    let start = 0, end = sorted.length;
    while (start < end) {
      const middle = (start + end) >> 1;
      if (sorted[middle] < value) start = middle + 1; else end = middle;
    }
    return start;
  }

  // The running mean, with a half-life of 2% of the steps; its first values are not pulled towards 0.
  function runningMean(values) {
    const keep = 0.5 ** (1 / Math.max(1, values.length / 50));
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return sum / weight;
    });
  }

  // The points of a line between two steps, and one on each side; of many, the lowest and highest of each of LIMIT / 2
  // groups, so that no peak is lost.
  function linePoints(column, values, [first, last]) {
    const from = Math.max(0, find(column, first) - 1), to = Math.min(column.length, find(column, last + 1) + 1);
    const size = Math.ceil((to - from) / (LIMIT / 2));
    const kept = [];
    for (let start = from; start < to; start += size) {
      let least = -1, most = -1;
      for (let i = start; i < Math.min(start + size, to); i++) {
        if (values[i] === null) continue;
        if (least < 0 || values[i] < values[least]) least = i;
        if (most < 0 || values[i] > values[most]) most = i;
      }
      if (least >= 0) kept.push(...(least === most ? [least] : [Math.min(least, most), Math.max(least, most)]));
    }
    return kept.map((i) => ({ step: column[i], value: values[i] }));
  }

  // The points of a chart; their kinds are the layers of its specification.
  function points(chart) {
    const found = [], span = shown(), { chart: key, smoothed } = chart.dataset;
    for (const run of data.runs) {
      const { step } = run.columns, values = run.columns[key];
      const add = (kind, label, list) => {
        for (const point of list) found.push({ ...point, kind, label, run: run.name });
      };
      const line = linePoints(step, values, span), hasMean = smoothed && smooth.checked && step.length > 20;
      if (hasMean) add("thin", "training", line);
      add("line", "training", hasMean ? linePoints(step, runningMean(values), span) : line);
      if (line.length === 1) add("dot", "training", line); // a line of one point is not seen
      if (key !== "loss") continue;
      // Symbols are drawn over the edges of the chart too, so that those outside of the range are left out.
      const inRange = (each) => each.step >= span[0] && each.step <= span[1];
      const evaluations = linePoints(run.evaluations.map(([at]) => at), run.evaluations.map(([, value]) => value), span);
      add("evaluation", "held-out rows", evaluations);
      add("diamond", "held-out rows", evaluations.filter(inRange));
      add("best", "held-out rows", evaluations.filter((each) => each.step === run.best && inRange(each)));
      const at = new Map(step.map((each, i) => [each, values[i]]));
      const spikes = run.spikes.map((each) => ({ step: each, value: at.get(each) }));
      add("spike", "training", spikes.filter((each) => each.value != null && inRange(each)));
    }
    return found;
  }

  const text = (value) => {
    if (value == null) return "not recorded";
    const size = Math.abs(value);
    return size >= 1000 ? Math.round(value).toLocaleString("en") : size && size < 1e-3 ? value.toExponential(2) : String(+value.toFixed(4));
  };

  function reading(key) {
    if (cursor === null) return "no step chosen";
    const parts = [];
    for (const run of data.runs) {
      const i = find(run.columns.step, cursor), has = run.columns.step[i] === cursor;
      const measured = key === "loss" ? run.evaluations.find(([step]) => step === cursor) : undefined;
      if (!has && !measured) continue;
      const values = [];
      if (has) values.push(text(run.columns[key][i]));
      if (measured) values.push(`held-out rows ${text(measured[1])}${cursor === run.best ? " (lowest)" : ""}`);
      parts.push((data.runs.length > 1 ? `${run.name}: ` : "") + values.join(", "));
    }
    return `step ${cursor.toLocaleString("en")}: ${parts.join("; ") || "not recorded"}`;
  }

  function showCursor() {
    for (const chart of charts) {
      const key = chart.dataset.chart, words = reading(key);
      chart.setAttribute("aria-valuetext", words);
      chart.setAttribute("aria-valuenow", String(cursor ?? shown()[0]));
      document.querySelector(`[data-reading="${key}"]`).textContent = cursor === null ? "\u00a0" : words;
      const view = views.get(key);
      if (view) view.data("cursor", cursor === null ? [] : [{ step: cursor }]).runAsync();
    }
  }

  // Draws all charts; the value of `typing`, an input of the range, stays.
  function draw(typing = null) {
    const [first, last] = shown();
    for (const chart of charts) {
      const view = views.get(chart.dataset.chart);
      chart.setAttribute("aria-valuemin", String(first));
      chart.setAttribute("aria-valuemax", String(last));
      if (view) view.signal("low", first).signal("high", last).data("points", points(chart)).runAsync();
    }
    for (const [input, value] of [[low, first], [high, last]]) if (input && input !== typing) input.value = value;
  }

  function zoom(first, last) {
    range = first === null || last <= first ? null : [first, last];
    draw();
  }

  // The recorded step at the horizontal position of a pointer.
  function stepAt(chart, event) {
    const view = views.get(chart.dataset.chart), svg = chart.querySelector("svg");
    if (!view || !svg) return null;
    const box = svg.getBoundingClientRect();
    const at = view.scale("x").invert(((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width - view.origin()[0]);
    const i = find(steps, at);
    return i > 0 && (i === steps.length || at - steps[i - 1] < steps[i] - at) ? steps[i - 1] : steps[i];
  }

  function listen(chart) {
    let start = null;
    chart.addEventListener("pointermove", (event) => {
      const at = stepAt(chart, event);
      if (at !== null && at !== cursor) { cursor = at; showCursor(); }
    });
    chart.addEventListener("pointerdown", (event) => { start = stepAt(chart, event); });
    chart.addEventListener("pointerup", (event) => {
      const end = stepAt(chart, event);
      if (start !== null && end !== null && end !== start) zoom(Math.min(start, end), Math.max(start, end));
      start = null;
    });
    chart.addEventListener("pointerleave", () => { start = null; });
    chart.addEventListener("keydown", (event) => {
      const [first, last] = shown();
      const inside = steps.filter((step) => step >= first && step <= last);
      const i = cursor === null ? -1 : find(inside, cursor), tenth = Math.max(1, Math.round(inside.length / 10));
      const target = {
        ArrowRight: i + 1, ArrowUp: i + 1, ArrowLeft: i - 1, ArrowDown: i - 1,
        PageUp: i + tenth, PageDown: i - tenth, Home: 0, End: inside.length - 1,
      }[event.key];
      if (event.key === "Escape") { cursor = null; zoom(null); showCursor(); }
      if (target === undefined || !inside.length) return;
      event.preventDefault();
      cursor = inside[Math.min(Math.max(target, 0), inside.length - 1)];
      showCursor();
    });
  }

  // Vega gives its container a role; the figure around it has the one that readers need.
  function inside(figure) {
    const place = document.createElement("div");
    place.className = "drawing";
    place.setAttribute("aria-hidden", "true");
    figure.replaceChildren(place);
    return place;
  }

  async function embedStatic() {
    for (const [id, spec] of Object.entries(data.static)) {
      const figure = document.getElementById(id);
      if (figure) await vegaEmbed(inside(figure), spec, OPTIONS);
    }
  }

  async function embed() {
    readSteps();
    for (const chart of charts) {
      const { view } = await vegaEmbed(inside(chart), data.charts[chart.dataset.chart], OPTIONS);
      views.set(chart.dataset.chart, view);
      listen(chart);
    }
    draw();
    await embedStatic();
    document.body.dataset.drawn = "yes";
  }

  // A closed part would be missing on paper.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed.push(...document.querySelectorAll("details:not([open])"));
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of closed) each.open = false;
    closed = [];
  });

  if (low) {
    const form = document.getElementById("range");
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", (event) => { event.preventDefault(); zoom(null); });
    for (const input of [low, high]) input.addEventListener("change", () => zoom(Number(low.value), Number(high.value)));
    smooth.addEventListener("change", () => draw());
  }

  // Puts news in the place of a part; what is open stays open, and the keyboard stays where it is.
  function replacePart(part, html) {
    const places = () => [...part.querySelectorAll("summary, [tabindex]")];
    const open = new Map([...part.querySelectorAll("details")].map((each) => [each.id, each.open]));
    const focused = places().indexOf(document.activeElement);
    part.innerHTML = html;
    for (const each of part.querySelectorAll("details")) if (open.has(each.id)) each.open = open.get(each.id);
    places()[focused]?.focus({ preventScroll: true });
  }

  // With --watch: ask the server of this page for news.
  async function refresh(version) {
    const status = document.getElementById("live");
    try {
      const answer = await fetch(`news?version=${encodeURIComponent(version)}`);
      if (answer.status === 200) {
        const news = await answer.json();
        version = news.version;
        if (Object.keys(news.data.charts).join() !== Object.keys(data.charts).join()) return location.reload();
        data = news.data;
        for (const [id, html] of Object.entries(news.parts)) replacePart(document.getElementById(id), html);
        document.getElementById("changed").textContent = news.changed;
        readSteps();
        draw(document.activeElement);
        showCursor();
        await embedStatic();
      }
      status.textContent = "live";
    } catch {
      status.textContent = "the server of this page has ended: start lora report --watch again";
    }
    setTimeout(refresh, 2000, version);
  }

  embed().then(() => { if ("live" in document.body.dataset) refresh(""); });
})();
