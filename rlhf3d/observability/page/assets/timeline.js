// Draws a profiled step: a lane for each process, with its spans and, of engines, its requests.
// Uses helpers of page.js, which calls it. Text of a run is only ever set as text.
"use strict";
const Timeline = (() => {
  const LANE = 20, LABEL = 15, GAP = 5, AXIS = 20, ROWS = 110, MOST_ROWS = 110;
  const NAME = 13; // a row of names of phases that are shorter than these
  // Color, its strength, and what it is called; several kinds may share a color.
  const LOOK = {
    phase: ["--c0", 0.2, "phases of the step"], call: ["--c9", 0.45, "at a phase, doing none of these"],
    schedule: ["--c10", 0.6, "waits for others"], wait: ["--c10", 0.6, "waits for others"],
    forward: ["--c0", 1, "forward"], backward: ["--c2", 1, "backward"],
    optimizer: ["--c4", 1, "optimizer"], collective: ["--c3", 1, "collectives"],
    transfer: ["--c5", 1, "weights under way"], prefill: ["--c1", 1, "engine step with prompts"],
    decode: ["--c6", 1, "engine step, tokens only"], command: ["--c8", 0.8, "command to an engine"],
  };
  const REQUESTS = [["--c1", 0.35, "request before its first token"], ["--c6", 0.75, "request writes"]];
  const IDLE = "--back";
  let found = [], at = null, from = 0, to = 1, chosen = null, dragged = null, canvas = null, room = 0, nameRows = 2;

  const shade = ([name, alpha]) => faint(color(name), alpha);
  const MICRO = /micro batch (\d+)/;
  const kindOf = (span) => at.kinds[span[2]];
  const hasPhases = (lane) => lane.spans.some((span) => kindOf(span) === "phase");
  const height = (lane) => LABEL + LANE + (hasPhases(lane) ? NAME * nameRows : 0) + (lane.rows ? 3 + Math.min(ROWS, 4 * lane.rows) : 0) + GAP;
  const time = (us) => us >= 1e6 ? digits(us / 1e6) + " s" : us >= 1e3 ? digits(us / 1e3) + " ms" : us ? us + " µs" : "0";

  function offer(profiles) {
    found = profiles;
    const drawable = profiles.filter((one) => one.lanes.length);
    const select = byId("timeline-step");
    select.replaceChildren();
    for (const one of drawable) element("option", "", one.step, select).value = one.step;
    select.selectedIndex = drawable.length - 1;
    byId("timeline-shown").hidden = !drawable.length;
    byId("timeline-note").textContent = profiles.length
      ? profiles.filter((one) => !one.lanes.length).map((one) => one.note).join(" ")
      : "No step was profiled (trainer.profile_steps).";
    choose();
  }

  function choose() {
    at = found.find((one) => String(one.step) === byId("timeline-step").value) || null;
    [from, to, chosen] = [0, at ? at.end : 1, null];
    if (!at) return;
    byId("timeline-words").replaceChildren();
    for (const text of at.words) element("li", "", text, byId("timeline-words"));
    const off = Math.max(...at.lanes.map((lane) => lane.error_us));
    byId("timeline-left-out").textContent = at.note +
      (off ? ` Clocks of other machines are known to ${digits(off)} µs.` : "");
    byId("timeline-about").textContent = "Drag over a part to see it larger; click or touch a span to read it.";
  }

  function keys() {
    const place = byId("timeline-keys");
    place.replaceChildren();
    const kinds = Object.keys(LOOK).filter((kind) => at.kinds.includes(kind));
    const looks = kinds.map((kind) => LOOK[kind]);
    if (at.lanes.some((lane) => lane.rows)) looks.push(...REQUESTS);
    const named = new Map(looks.map((look) => [look[2], look]));
    for (const [name, look] of named) addKey(place, shade(look), name);
    addKey(place, color(IDLE), "idle (empty)").parentElement.firstChild.style.outline = "1px solid " + color("--line");
    if (at.labels.some((text) => MICRO.test(text))) element("span", "", "number on a span: its micro-batch", place);
  }

  function draw() {
    if (!at) return;
    const place = byId("timeline-place");
    const width = printing ? 660 : place.clientWidth;
    room = place.clientWidth;
    nameRows = width < 800 ? 3 : 2;
    const tall = AXIS + at.lanes.reduce((sum, lane) => sum + height(lane), 0);
    const ratio = printing ? 2 : devicePixelRatio;
    canvas = document.createElement("canvas");
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
    canvas.style.width = width + "px";
    canvas.style.height = tall + "px";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Timeline of step ${at.step}. ${at.words.join(" ")}`);
    place.replaceChildren(canvas);
    listen(canvas);
    keys();
    paint();
  }

  const x = (us) => (us - from) / (to - from) * canvas.clientWidth;
  const us = (left) => from + left / canvas.clientWidth * (to - from);

  function paint() {
    const ctx = canvas.getContext("2d"), ratio = canvas.width / parseFloat(canvas.style.width);
    const width = parseFloat(canvas.style.width), tall = parseFloat(canvas.style.height);
    const scale = (moment) => (moment - from) / (to - from) * width;
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, tall);
    ctx.font = "11px system-ui, sans-serif";
    axis(ctx, width, tall, scale);
    let top = AXIS;
    for (const lane of at.lanes) {
      ctx.fillStyle = color("--soft");
      ctx.fillText(lane.name, 0, top + LABEL - 4);
      bars(ctx, lane, top + LABEL, width, scale);
      if (hasPhases(lane)) names(ctx, lane, top + LABEL + LANE, width, scale);
      if (lane.rows) requests(ctx, lane, top + LABEL + LANE + 3, width, scale);
      top += height(lane);
    }
    if (dragged) {
      ctx.fillStyle = faint(color("--link"), 0.18);
      ctx.fillRect(dragged[0], 0, dragged[1] - dragged[0], tall);
    }
  }

  function axis(ctx, width, tall, scale) {
    const step = [1, 2, 5].flatMap((one) => [...Array(9).keys()].map((power) => one * 10 ** power))
      .sort((a, b) => a - b).find((one) => one * width >= 80 * (to - from)) || 1e9;
    ctx.fillStyle = color("--soft");
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) {
      const left = Math.round(scale(tick));
      const text = time(tick), room = ctx.measureText(text).width;
      if (left + room <= width) ctx.fillText(text, left, 11);
      ctx.fillStyle = color("--grid");
      ctx.fillRect(left, 14, 1, tall - 14);
      ctx.fillStyle = color("--soft");
    }
  }

  // Spans in order: what is inside another comes after it and covers it.
  function bars(ctx, lane, top, width, scale) {
    ctx.fillStyle = color(IDLE);
    ctx.fillRect(0, top, width, LANE);
    ctx.strokeStyle = color("--line");
    ctx.lineWidth = 1;
    ctx.strokeRect(0.5, top + 0.5, width - 1, LANE - 1);
    const fills = Object.fromEntries(Object.entries(LOOK).map(([kind, look]) => [kind, shade(look)]));
    const card = color("--card");
    lane.spans.forEach((span, number) => {
      const left = Math.max(0, scale(span[0])), right = Math.min(width, scale(span[0] + span[1]));
      if (right < 0 || left > width) return;
      const wide = Math.max(right - left, 0.7), kind = kindOf(span);
      ctx.fillStyle = card; // colors are pale where others lie below
      ctx.fillRect(left, top, wide, LANE);
      ctx.fillStyle = fills[kind];
      ctx.fillRect(left, top, wide > 3 ? wide - 0.6 : wide, LANE);
      if (chosen && chosen[0] === lane && chosen[1] === number) {
        ctx.strokeStyle = color("--ink");
        ctx.lineWidth = 2;
        ctx.strokeRect(left + 1, top + 1, Math.max(wide - 2, 1), LANE - 2);
      }
      label(ctx, span, kind, left, wide, top);
    });
  }

  // The name of a phase, and the number of a pass's micro-batch, where there is room.
  function label(ctx, span, kind, left, wide, top) {
    const text = at.labels[span[3]];
    const micro = MICRO.exec(text);
    const shown = kind === "phase" ? text : micro && (kind === "forward" || kind === "backward") ? micro[1] : "";
    if (!shown || !fits(ctx, shown, wide)) return;
    ctx.fillStyle = kind === "phase" ? color("--ink") : color("--card");
    ctx.fillText(shown, left + 3, top + 14);
  }

  const fits = (ctx, text, wide) => ctx.measureText(text).width + 6 <= wide;

  // Names that have no room in their phases, below these: the longest first, as far as there is room.
  function names(ctx, lane, top, width, scale) {
    const taken = Array.from({ length: nameRows }, () => []), placed = [];
    const short = lane.spans.filter((span) => kindOf(span) === "phase").map(([began, took, , text]) => {
      const left = Math.max(0, scale(began)), right = Math.min(width, scale(began + took));
      return { left, right, text: at.labels[text], long: ctx.measureText(at.labels[text]).width };
    }).filter((one) => one.right > 0 && one.left < width && !fits(ctx, one.text, one.right - one.left));
    ctx.fillStyle = color("--soft");
    for (const { left, text, long } of short.sort((a, b) => b.right - b.left - (a.right - a.left))) {
      const begin = Math.max(0, Math.min(left, width - long)), end = begin + long + 8;
      const row = taken.findIndex((row) => row.every(([from, to]) => end <= from || to <= begin));
      if (row < 0) break;
      taken[row].push([begin, end]);
      placed.push([text, begin + 3, top + row * NAME, long]);
      ctx.fillRect(left, top, 1, 3 + row * NAME);
    }
    for (const [text, begin, row, long] of placed) {
      ctx.fillStyle = color("--card"); // over the lines of names below
      ctx.fillRect(begin - 1, row + 2, long + 2, NAME - 2);
      ctx.fillStyle = color("--soft");
      ctx.fillText(text, begin, row + 11);
    }
  }

  // A line for each request where they can be told apart, else how many there are.
  function requests(ctx, lane, top, width, scale) {
    const tall = Math.min(ROWS, 4 * lane.rows), row = tall / lane.rows;
    const [waits, writes] = REQUESTS.map(shade);
    const thick = lane.rows > MOST_ROWS ? 1 : Math.max(1, row - 1);
    for (const [number, submitted, first, ended] of lane.requests) {
      const y = top + number * row, end = ended == null ? at.end : ended;
      const begins = first == null ? end : first;
      const [a, b, c] = [submitted, begins, end].map((one) => Math.min(width, Math.max(0, scale(one))));
      ctx.fillStyle = waits;
      ctx.fillRect(a, y, b - a, thick);
      ctx.fillStyle = writes;
      ctx.fillRect(b, y, c - b, thick);
    }
  }

  // What is at a place: [lane, number of the span or -1, request, time].
  function under(left, y) {
    let top = AXIS;
    for (const lane of at.lanes) {
      if (y < top + height(lane)) {
        const moment = us(left), reach = (to - from) / canvas.clientWidth * 3;
        if (!lane.rows || y < top + LABEL + LANE + 2) {
          for (let number = lane.spans.length - 1; number >= 0; number--) {
            const [began, took] = lane.spans[number];
            const short = took < 2 * reach ? reach : 0;
            if (began - short <= moment && moment <= began + took + short) return [lane, number, null, moment];
          }
          return [lane, -1, null, moment];
        }
        const row = (y - top - LABEL - LANE - 3) / Math.min(ROWS, 4 * lane.rows) * lane.rows;
        const one = lane.requests.find(([number, begin, , end]) => number === Math.floor(row) &&
          begin <= moment && moment <= (end == null ? at.end : end));
        return [lane, -1, one || null, moment];
      }
      top += height(lane);
    }
    return null;
  }

  function tell(hit) {
    const about = byId("timeline-about");
    if (!hit) return;
    const [lane, number, request, moment] = hit;
    if (request) {
      const [, submitted, first, ended, tokens] = request;
      const words = [lane.name, `request, ${tokens} tokens`, `submitted at ${time(submitted)}`];
      words.push(first == null ? "no token yet" : `first token after ${time(first - submitted)}`);
      words.push(ended == null ? "goes on after the step" : `done at ${time(ended)}`);
      about.textContent = words.join(" · ");
    } else if (number >= 0) {
      const [began, took, , text] = lane.spans[number];
      const waits = kindOf(lane.spans[number]) === "schedule";
      const [from, to] = waits ? gap(lane, number, moment) : [began, began + took];
      const name = waits ? "waits in the pipeline" : at.labels[text];
      about.textContent = [lane.name, name, time(to - from), `from ${time(from)}`].join(" · ");
    } else {
      about.textContent = `${lane.name} · nothing recorded`;
    }
  }

  // Between what comes before a time and after it, inside of a span.
  function gap(lane, number, moment) {
    let [from, took] = lane.spans[number];
    let to = from + took;
    for (const [began, length] of lane.spans.slice(number + 1)) {
      if (began + length <= moment) from = Math.max(from, began + length);
      if (began >= moment) to = Math.min(to, began);
    }
    return [from, to];
  }

  function zoom(begin, end) {
    const least = 20, all = at.end;
    if (end - begin < least) end = begin + least;
    from = Math.max(0, Math.min(begin, all - least));
    to = Math.min(all, end);
    paint();
  }

  function listen(place) {
    let began = null;
    const left = (event) => event.clientX - place.getBoundingClientRect().left;
    place.addEventListener("pointerdown", (event) => {
      began = left(event);
      place.setPointerCapture(event.pointerId);
    });
    place.addEventListener("pointermove", (event) => {
      const now = left(event);
      if (began === null) {
        tell(under(now, event.clientY - place.getBoundingClientRect().top));
        return;
      }
      dragged = Math.abs(now - began) > 6 ? [Math.min(began, now), Math.max(began, now)] : null;
      paint();
    });
    place.addEventListener("pointerup", (event) => {
      if (began === null) return;
      const area = dragged;
      began = dragged = null;
      if (area) {
        zoom(us(area[0]), us(area[1]));
        return;
      }
      chosen = under(left(event), event.clientY - place.getBoundingClientRect().top);
      tell(chosen);
      paint();
    });
    place.addEventListener("pointercancel", () => { began = dragged = null; paint(); });
    place.addEventListener("dblclick", () => zoom(0, at.end));
  }

  function start() {
    // A scrollbar that comes once the page is long takes room too.
    new ResizeObserver(() => {
      if (!printing && byId("timeline-place").clientWidth !== room) requestAnimationFrame(draw);
    }).observe(byId("timeline-place"));
    byId("timeline-step").addEventListener("change", () => { choose(); draw(); });
    const closer = (factor) => {
      const middle = (from + to) / 2, half = (to - from) * factor / 2;
      zoom(middle - half, middle + half);
    };
    byId("timeline-in").addEventListener("click", () => closer(0.5));
    byId("timeline-out").addEventListener("click", () => closer(2));
    byId("timeline-all").addEventListener("click", () => zoom(0, at.end));
  }

  // What the reader chose, for a page that takes this one's place.
  function kept() {
    const last = byId("timeline-step").options.length - 1;
    return at && (byId("timeline-step").selectedIndex < last || from > 0 || to < at.end)
      ? [at.step, from, to] : null;
  }

  function restore(chosenBefore) {
    if (!chosenBefore || !found.some((one) => one.step === chosenBefore[0])) return;
    byId("timeline-step").value = chosenBefore[0];
    choose();
    draw();
    zoom(chosenBefore[1], chosenBefore[2]);
  }

  return { offer, draw, start, kept, restore };
})();
