// Draws what the page's data holds. Text of a run is only ever set as text.
"use strict";
let data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const faint = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
const hue = (number) => color("--c" + (number % 12));
const PRINT_WIDTH = 310, HEIGHT = 205;
// Of the lines of a chart, so that those that coincide can be told apart; with their CSS class.
const DASHES = [[undefined, ""], [[7, 5], " dashed"], [[2, 4], " dotted"]];
let chosenRun = 0, printing = false, drawn = [];

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

function element(tag, className, text, parent) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(+value.toPrecision(3));
}
const FORMATS = {
  share: (v) => digits(100 * v) + " %",
  seconds: (v) => digits(v) + " s",
  number: digits, tokens: digits, nats: digits,
};

function chartBox(parent, id, title, help, unit) {
  const box = parent.tagName === "FIGURE" ? parent : element("figure", "chart", undefined, parent);
  if (id) box.id = id;
  box.replaceChildren();
  const head = element("h3", "", title, box);
  if (unit) element("span", "unit", ", " + unit, head);
  element("p", "help", help, box);
  const keys = element("div", "keys", undefined, box);
  return { box, keys, place: element("div", "", undefined, box) };
}

// `line`: the class of a line's dashes; without, an area.
function addKey(keys, stroke, label, line) {
  const key = element("span", "", undefined, keys);
  const swatch = element("i", "swatch" + (line === undefined ? "" : " line" + line), undefined, key);
  swatch.style[line === undefined ? "background" : "borderTopColor"] = stroke;
  key.append(label + " ");
  return element("b", "", "", key);
}

// `series`: uPlot's; `shown`: [series, where its value is written, how it is read, what is written
// while the pointer is elsewhere].
function draw(place, table, series, options, shown) {
  const format = FORMATS[options.format] || digits;
  const axis = { stroke: color("--soft"), font: "11px system-ui, sans-serif",
    grid: { stroke: color("--grid"), width: 1 }, ticks: { stroke: color("--grid"), width: 1 } };
  const width = printing ? (options.wide ? 2 * PRINT_WIDTH : PRINT_WIDTH) : place.clientWidth;
  const write = (plot) => {
    const at = plot.cursor.idx;
    for (const [index, target, read, rest] of shown) {
      let value = at == null ? rest : read ? read(at) : table[index][at];
      if (at == null && value == null) {
        for (let i = table[0].length - 1; i >= 0 && value == null; i--) {
          value = read ? read(i) : table[index][i];
        }
      }
      target.textContent = value == null ? "" : format(value);
    }
    if (options.atStep) {
      const last = "step " + table[0][table[0].length - 1];
      options.atStep.textContent = at == null ? options.rest || last : "step " + table[0][at];
    }
  };
  const plot = new uPlot({
    width, height: options.wide ? 260 : HEIGHT,
    legend: { show: false },
    cursor: { y: false, sync: options.alone ? undefined : { key: "steps", setSeries: false },
      points: { size: 6 }, drag: { x: true, y: false } },
    scales: { x: { time: false, range: options.xRange }, y: { range: options.yRange } },
    axes: [
      { ...axis, size: 24, label: "step", labelSize: 15, labelFont: axis.font, labelGap: 0, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5] },
      { ...axis, size: 54, values: (_, ticks) => ticks.map(format) },
    ],
    series: [{}, ...series], bands: options.bands,
    hooks: { setCursor: [write], ready: [write], draw: [(plot) => drawMarks(plot, options)] },
  }, table, place);
  drawn.push([plot, place, options]);
}

// A line at a check's limit, with its key, and dotted ones at resumes, where the scales reach them.
function drawMarks(plot, options) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio;
  const inside = (value, scale) => value >= scale.min && value <= scale.max;
  const line = (stroke, dash, from, to) => {
    ctx.save();
    ctx.strokeStyle = stroke;
    ctx.lineWidth = ratio;
    ctx.setLineDash(dash.map((length) => length * ratio));
    ctx.beginPath();
    ctx.moveTo(...from);
    ctx.lineTo(...to);
    ctx.stroke();
    ctx.restore();
  };
  const limited = options.limit != null && inside(options.limit, plot.scales.y);
  if (options.limitKey) options.limitKey.style.display = limited ? "" : "none";
  if (limited) {
    const y = plot.valToPos(options.limit, "y", true);
    line(color("--watch"), [], [bbox.left, y], [bbox.left + bbox.width, y]);
  }
  for (const step of data.resumes) {
    if (!inside(step + 0.5, plot.scales.x)) continue;
    const x = plot.valToPos(step + 0.5, "x", true);
    line(color("--soft"), [2, 3], [x, bbox.top], [x, bbox.top + bbox.height]);
  }
}

function yRange(format) {
  return (_, low, high) => {
    if (low == null) return [0, 1];
    const room = 0.08 * (high - low || Math.abs(high) || 1);
    if (format === "share") {
      return [low < 0 ? low - room : 0, Math.min(Math.max(high + room, 0.02), 1.0001)];
    }
    const fromZero = low >= 0 && (low < 0.6 * high || format === "tokens" || format === "seconds");
    return [fromZero ? 0 : low - room, high + room];
  };
}

function curveChart(parent, chart) {
  const { keys, place } = chartBox(parent, chart.id, chart.title, chart.help, chart.unit);
  const tables = [], series = [], bands = [], shown = [];
  chart.lines.forEach((line, number) => {
    const several = data.runs.length > 1;
    const stroke = hue(several ? line.run : number);
    const few = line.steps.length <= 60, pale = line.steps.length > 300 ? 0.25 : 0.45;
    const smooth = line.mean.length > 0;
    const [dash, dashed] = DASHES[(several ? 0 : number) % DASHES.length];
    const raw = series.length + 1;
    tables.push([line.steps, line.raw]);
    series.push({
      stroke: smooth ? faint(stroke, pale) : stroke, width: smooth ? 1 : 2, spanGaps: !smooth,
      dash: smooth ? undefined : dash,
      points: { show: few, size: 4, stroke: smooth ? faint(stroke, pale) : stroke,
        fill: smooth ? faint(stroke, pale) : stroke },
    });
    if (smooth) {
      tables[tables.length - 1].push(line.mean);
      series.push({ stroke, width: 2, dash, points: { show: false } });
    }
    if (line.low.length) {
      tables[tables.length - 1].push(line.high, line.low);
      const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: !smooth };
      series.push(edge, { ...edge });
      bands.push({ series: [series.length - 1, series.length], fill: faint(stroke, 0.16) });
    }
    const label = several ? data.runs[line.run] : line.label;
    shown.push([raw, addKey(keys, stroke, label, dashed), undefined, line.now]);
  });
  if (bands.length) addKey(keys, faint(color("--c9"), 0.3), "± one standard error");
  const limitKey = chart.limit == null ? undefined
    : addKey(keys, color("--watch"), "where a check warns", "").parentElement;
  const means = new Set(chart.lines.filter((line) => line.mean.length).map((line) =>
    data.windows[line.run]));
  const rest = means.size ? `mean of the last ${[...means].join(" / ")} steps` : "";
  const atStep = element("span", "", "", keys);
  const table = tables.length > 1 ? uPlot.join(tables) : tables[0];
  draw(place, table, series,
    { format: chart.format, limit: chart.limit, limitKey, bands, yRange: yRange(chart.format), atStep, rest },
    shown);
}

function stackChart(parent, title, help, steps, parts, format, hues, wide) {
  const { keys, place } = chartBox(parent, null, title, help);
  const names = Object.keys(parts);
  const sums = steps.map(() => 0);
  const tops = names.map((name) => parts[name].map((v, i) => (sums[i] += v || 0)));
  const bars = steps.length <= 80;
  const table = [steps], series = [], shown = [];
  names.forEach((name, number) => {
    shown.push([0, addKey(keys, hues[number], name), (i) => parts[name][i]]);
  });
  const atStep = element("span", "", "", keys);
  // From the top down: each covers the part below its own top.
  for (let number = names.length - 1; number >= 0; number--) {
    const fill = hues[number];
    table.push(tops[number]);
    series.push({ fill, stroke: fill, width: bars ? 0 : 1, points: { show: false },
      paths: bars ? uPlot.paths.bars({ size: [0.86, 60] }) : undefined });
  }
  const gap = steps.length > 1 ? (steps[steps.length - 1] - steps[0]) / (steps.length - 1) : 1;
  draw(place, table, series, {
    format, wide, atStep, alone: bars,
    xRange: bars ? (_, low, high) => [low - gap / 2, high + gap / 2] : undefined,
    yRange: (_, low, high) => [0, format === "share" ? 1 : high * 1.05 || 1],
  }, shown);
}

function fanChart(parent, title, help, spread, format) {
  const { keys, place } = chartBox(parent, null, title, help);
  const stroke = color("--c0");
  const few = spread.steps.length <= 60;
  const edge = { stroke: faint(stroke, 0.25), width: 1, points: { show: few, size: 3 } };
  const series = [edge, { ...edge }, { stroke, width: 2, points: { show: few, size: 4 } },
    { ...edge }, { ...edge }];
  const shown = [[3, addKey(keys, stroke, "median", "")]];
  for (const [alpha, ends] of [[0.34, [[2, "25 %"], [4, "75 %"]]], [0.14, [[1, "10 %"], [5, "90 %"]]]]) {
    for (const [index, label] of ends) {
      shown.push([index, addKey(keys, faint(stroke, alpha), label + " at most")]);
    }
  }
  const atStep = element("span", "", "", keys);
  draw(place, [spread.steps, ...spread.columns], series, {
    format, atStep, yRange: yRange(format),
    bands: [{ series: [5, 1], fill: faint(stroke, 0.14) },
      { series: [4, 2], fill: faint(stroke, 0.2) }],
  }, shown);
}

// From gray, the lowest score, to green, the highest.
function ramp(count) {
  const [low, high] = ["--low", "--c2"].map((name) => parseInt(color(name).slice(1), 16));
  const channel = (hex, shift) => (hex >> shift) & 255;
  return [...Array(count).keys()].map((number) => {
    const part = count > 1 ? number / (count - 1) : 1;
    const mixed = [16, 8, 0].map((shift) =>
      Math.round(channel(low, shift) + part * (channel(high, shift) - channel(low, shift))));
    return "#" + mixed.map((value) => value.toString(16).padStart(2, "0")).join("");
  });
}

// How many of the steps of the run chosen are shown.
function stepsTold(count) {
  const all = data.steps[chosenRun];
  return count >= all ? "all steps" : `${count} of ${all} steps, evenly spaced over the run`;
}

function spreadCharts() {
  const place = byId("spreads"), found = data.spreads[chosenRun];
  place.replaceChildren();
  byId("spreads-note").textContent = found.score
    ? `From the completions of ${stepsTold(found.score.steps.length)}.`
    : "The run has no samples of training.";
  for (const [name, title, format] of [["score", "Scores", "number"], ["length", "Lengths", "tokens"]]) {
    const spread = found[name];
    if (!spread) continue;
    if (spread.shares) {
      const parts = Object.fromEntries(spread.labels.map((label, i) => [label, spread.columns[i]]));
      stackChart(place, title, "Share of a step's completions with each score.", spread.steps,
        parts, "share", ramp(spread.labels.length));
    } else {
      fanChart(place, title,
        "Median of a step's completions; the middle half; all but the lowest and highest tenth.",
        spread, format);
    }
  }
}

function phaseChart() {
  const { steps, parts } = data.phases[chosenRun];
  if (!Object.keys(parts).length) { byId("phases").hidden = true; return; }
  byId("phases").hidden = false;
  const beside = data.charts.some((chart) => chart.id === "waits")
    ? " Generation that goes on beside training is not in it." : "";
  stackChart(byId("phases"), "Seconds of each phase", "What a step's time went to." + beside,
    steps, parts, "seconds", Object.keys(parts).map((_, number) => hue(number)), true);
}

function drawAll() {
  for (const [plot] of drawn) plot.destroy();
  drawn = [];
  byId("charts").replaceChildren();
  for (const chart of data.charts) curveChart(byId("charts"), chart);
  phaseChart();
  spreadCharts();
  Timeline.draw();
}

const FIRST = "the first groups";
function stepShown() {
  const steps = data.groups[chosenRun], value = byId("groups-step").value;
  return steps.find((one) => String(one.step) === value) || steps[steps.length - 1];
}

// What of the step chosen can be shown; what was chosen before stays chosen where it is there.
function offerKinds() {
  const at = stepShown(), select = byId("groups-kind"), before = select.value;
  select.replaceChildren();
  for (const title of [FIRST, ...(at ? at.picks : []).map((pick) => pick.title)]) {
    element("option", "", title, select).value = title;
  }
  select.value = before || FIRST;
  if (select.selectedIndex < 0) select.value = FIRST;
}

function showGroups() {
  const at = stepShown(), place = byId("groups");
  place.replaceChildren();
  if (!at) return;
  const pick = at.picks.find((one) => one.title === byId("groups-kind").value);
  const { groups, more } = pick || at;
  byId("groups-note").textContent = (pick
    ? `Of step ${at.step}: ${pick.title}`
    : `The first ${counted(groups.length, "group")} of the step, not chosen by result`) +
    (more ? `; ${more} more are not shown` : "") +
    `. Shown: ${stepsTold(data.groups[chosenRun].length)}.`;
  for (const group of groups) {
    const box = element("div", "group", undefined, place);
    const prompt = element("p", "prompt", group.prompt, box);
    leftOut(prompt, group.prompt_left_out);
    if (group.truth) element("p", "truth", "wanted: " + group.truth, box);
    const side = element("div", "side", undefined, box);
    for (const answer of group.answers) {
      const card = element("div", "answer", undefined, side);
      card.style.setProperty("--worth", answer.worth + "%");
      const read = answer.read ? ` · read as ${answer.read}` : "";
      element("p", "about", `score ${answer.mark}${read} · ${answer.length} tokens` +
        (answer.cut_off ? ", cut off" : ""), card);
      leftOut(element("p", "text", answer.text, card), answer.left_out);
    }
    if (group.more) element("p", "note", `${group.more} more completions are not shown.`, box);
  }
}

// The group of a trajectory, where it is among those shown: a button that goes there.
function tellGroup(at) {
  const place = byId("token-group");
  place.replaceChildren();
  if (!at) return;
  place.append(`Sample ${at.number} of step ${at.step}, counted from 0. `);
  const of = data.groups[chosenRun].find((one) => one.step === at.step);
  const number = of ? of.groups.findIndex((group) =>
    group.first <= at.number && at.number < group.first + group.answers.length + group.more) : -1;
  if (number < 0) return;
  const button = element("button", "", "Its group", place);
  button.type = "button";
  button.addEventListener("click", () => {
    byId("groups-step").value = at.step;
    offerKinds();
    byId("groups-kind").value = FIRST;
    showGroups();
    byId("groups").children[number].scrollIntoView({ block: "center" });
  });
}

function leftOut(parent, count) {
  if (count) element("i", "", ` … ${count} characters more`, parent);
}

const AUTHORS = { prompt: "the prompt", sampled: "the policy (trained on)",
  template: "the chat template", environment: "the environment or a tool" };
const heat = (part) => `color-mix(in srgb, var(--bad) ${Math.round(75 * Math.min(1, part))}%, transparent)`;

function showTokens() {
  const found = data.trajectories[chosenRun], at = found[+byId("trajectory").value || 0];
  const text = byId("token-text"), about = byId("token-about"), mode = byId("color").value;
  text.replaceChildren();
  about.textContent = "";
  text.hidden = byId("tokens-choose").hidden = !at;
  byId("token-legend").replaceChildren();
  tellGroup(at);
  if (!at) {
    byId("tokens-note").textContent = "The run kept no tokens (trainer.sample_tokens).";
    return;
  }
  legend(mode, new Set(at.tokens.map((token) => token[2])));
  byId("worst").hidden = at.worst === null;
  if (at.skipped_before) element("i", "", `… ${at.skipped_before} tokens before … `, text);
  at.tokens.forEach((token, place) => {
    const [piece, , author, , engine, , difference] = token;
    const shown = element("span", "", piece === "" ? "·" : piece.replaceAll("\n", "↵\n"), text);
    if (mode === "author") shown.classList.add("by-" + author);
    // 0.7 nats: the probabilities differ by a factor of two.
    if (mode === "difference" && difference !== null) shown.style.background = heat(difference / 0.7);
    if (mode === "logprob" && engine !== null) shown.style.background = heat(-engine / 5);
    if (place === at.worst) shown.classList.add("worst");
    shown.dataset.place = place;
  });
  if (at.skipped_after) element("i", "", ` … ${at.skipped_after} tokens after`, text);
}

function legend(mode, authors) {
  const place = byId("token-legend");
  if (mode === "author") {
    for (const [author, meaning] of Object.entries(AUTHORS)) {
      if (authors.has(author)) element("span", "by-" + author, meaning, place);
    }
    return;
  }
  const [low, high, what] = mode === "difference"
    ? ["0", "0.7 nats or more (a factor of two)", "Difference of engine and trainer:"]
    : ["0", "−5 or less", "Log-prob, nats, that the engine gave the token when it drew it:"];
  place.append(what + " " + low);
  element("i", "scale", undefined, place);
  place.append(high);
}

function tellToken(shown) {
  const at = data.trajectories[chosenRun][+byId("trajectory").value || 0];
  const [piece, id, author, version, engine, trainer, difference] = at.tokens[+shown.dataset.place];
  byId("token-text").querySelectorAll(".chosen").forEach((one) => one.classList.remove("chosen"));
  shown.classList.add("chosen");
  const words = [`${JSON.stringify(piece)} (id ${id}, position ${at.skipped_before + +shown.dataset.place})`,
    `written by ${AUTHORS[author] || author}`];
  if (version !== null) words.push(`version ${version}`);
  if (engine !== null) words.push(`log-prob of the engine ${engine}`);
  if (trainer !== null) words.push(`of the trainer ${trainer}`);
  if (difference !== null) {
    words.push(difference >= 1e9 ? "one of them is not finite" : `difference ${difference} nats`);
  }
  byId("token-about").textContent = words.join(" · ");
}

function goToWorst() {
  const found = byId("token-text").querySelector(".worst");
  if (!found) return;
  byId("color").value = "difference";
  showTokens();
  const again = byId("token-text").querySelector(".worst");
  tellToken(again);
  again.scrollIntoView({ block: "center" });
}

function chooseRun(number) {
  chosenRun = number;
  for (const part of document.querySelectorAll("[data-run]")) {
    part.hidden = +part.dataset.run !== number;
  }
  const steps = byId("groups-step");
  steps.replaceChildren();
  for (const { step } of data.groups[number]) element("option", "", step, steps).value = step;
  steps.selectedIndex = steps.length - 1;
  steps.parentElement.parentElement.hidden = !steps.length;
  byId("groups-note").textContent = steps.length ? "" : "The run has no samples of training.";
  const select = byId("trajectory"), found = data.trajectories[number];
  select.replaceChildren();
  found.forEach((one, place) => {
    const worst = place === 0 && one.worst !== null ? ", the worst token" : "";
    element("option", "", `step ${one.step}, sample ${one.number}, score ${digits(one.score)}${worst}`,
      select).value = place;
  });
  if (found.length && found[0].worst !== null) {
    const worst = found[0].tokens[found[0].worst];
    byId("tokens-note").textContent =
      `Engine and trainer differ most on ${JSON.stringify(worst[0])} in trajectory ${found[0].number} ` +
      `of step ${found[0].step}: log-probs ${worst[4]} and ${worst[5]}. Touch a token to see its own.`;
  } else if (found.length) {
    byId("tokens-note").textContent = "The run did not compute log-probs of the trainer for what it " +
      "sampled, so there is nothing to compare. Touch a token to see its log-prob.";
    byId("color").querySelector("[value=difference]").disabled = true;
  }
  offerKinds();
  showGroups();
  showTokens();
  Timeline.offer(data.profiles[number]);
}

// Begins with the page's elements and data, which may be new ones (watch.js).
function start() {
  byId("groups-step").addEventListener("change", () => { offerKinds(); showGroups(); });
  byId("groups-kind").addEventListener("change", showGroups);
  byId("trajectory").addEventListener("change", showTokens);
  byId("color").addEventListener("change", showTokens);
  byId("worst").addEventListener("click", goToWorst);
  byId("token-text").addEventListener("click", (event) => {
    if (event.target.dataset.place !== undefined) tellToken(event.target);
  });
  Timeline.start();
  if (byId("run")) {
    byId("run").value = chosenRun;
    byId("run").addEventListener("change", (event) => {
      chooseRun(+event.target.value);
      drawAll();
    });
  }
  chooseRun(chosenRun);
  drawAll();
}
start();

let width = innerWidth, waiting = null;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's address bar
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 150);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
function print(on) {
  printing = on;
  document.documentElement.classList.toggle("print", on);
  drawAll();
}
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
document.documentElement.dataset.ready = "yes";
