// Asks for the state of the runs, and puts a new page in the place of the old one, where the reader
// is and as the reader left it. Text of a run is only ever set as text.
"use strict";
{
  const EVERY_MS = 3000;
  const root = document.documentElement;
  let told = "", asking = false;

  // Lines of their own above the page: they change more often than the page does.
  const place = document.getElementById("live") || document.createElement("div");
  place.id = place.className = "live";
  const lines = document.createElement("div");
  const hold = document.createElement("input");
  hold.type = "checkbox";
  const label = document.createElement("label");
  label.append(hold, " hold the page");
  place.replaceChildren(lines, label);
  label.hidden = !document.getElementById("data"); // nothing to hold yet
  document.body.prepend(place);

  function tell(status) {
    if (status.join("\n") === told) return;
    told = status.join("\n");
    lines.replaceChildren(...status.map((line) => {
      const text = document.createElement("p");
      text.textContent = line;
      return text;
    }));
  }

  async function fetched(path) {
    const answer = await fetch(path, { signal: AbortSignal.timeout(60000) });
    if (!answer.ok) throw new Error(String(answer.status));
    return answer;
  }

  async function poll() {
    if (document.hidden || asking) return;
    asking = true;
    try {
      const { version, status } = await (await fetched("/version")).json();
      // Of a page in which text is selected, or which is printed, nothing is taken away.
      const busy = hold.checked || !getSelection().isCollapsed || root.classList.contains("print");
      if (version !== root.dataset.version && !busy) await renew();
      tell(status);
    } catch (error) {
      tell(["rlhf3d watch does not answer: the page stays as it was."]);
    } finally {
      asking = false;
    }
  }

  async function renew() {
    const html = await (await fetched("/")).text();
    const page = new DOMParser().parseFromString(html, "text/html");
    if (!document.getElementById("data") || !page.getElementById("data")) {
      location.reload(); // there is nothing yet that could be kept
      return;
    }
    const restore = kept();
    for (const name of ["header", "main"]) {
      document.querySelector(name).replaceWith(page.querySelector(name));
    }
    data = JSON.parse(page.getElementById("data").textContent);
    document.title = page.title;
    root.dataset.version = page.documentElement.dataset.version;
    restore();
  }

  const selected = (id) => byId(id).options[byId(id).selectedIndex]?.text;
  const title = (place) => place.parentElement.querySelector("h3").textContent;
  const details = () => [...document.querySelectorAll("main section[id]")].flatMap((section) =>
    [...section.querySelectorAll("details")].map((one, number) =>
      [section.id + (one.dataset.name || number), one]));

  // What the reader chose; returns the function that chooses it again on the new page.
  function kept() {
    const run = data.runs[chosenRun];
    const open = details().filter(([, one]) => one.open).map(([key]) => key);
    const focus = document.activeElement?.id;
    const mode = byId("color").value;
    // The last step and the first trajectory are what a page begins with: they move on.
    const steps = byId("groups-step"), trajectories = byId("trajectory");
    const step = steps.selectedIndex < steps.options.length - 1 ? selected("groups-step") : null;
    const kind = selected("groups-kind");
    const trajectory = trajectories.selectedIndex > 0 ? selected("trajectory") : null;
    const token = document.querySelector("#token-text .chosen")?.dataset.place;
    const of = selected("trajectory");
    const timeline = Timeline.kept();
    const zooms = drawn.filter(([plot]) => zoomed(plot)).map(([plot, at]) =>
      [title(at), { ...plot.scales.x }, { ...plot.scales.y }]);
    const [anchor, top] = read();
    return () => {
      for (const [key, one] of details()) one.open = open.includes(key);
      chosenRun = data.runs[chosenRun] === run ? chosenRun : Math.max(0, data.runs.indexOf(run));
      start();
      choose("groups-step", step);
      offerKinds();
      choose("groups-kind", kind);
      choose("trajectory", trajectory);
      if (!byId("color").querySelector(`[value=${mode}]`).disabled) byId("color").value = mode;
      showGroups();
      showTokens();
      const again = document.querySelector(`#token-text [data-place="${token}"]`);
      if (again && selected("trajectory") === of) tellToken(again);
      for (const [name, x, y] of zooms) {
        const [plot] = drawn.find(([, at]) => title(at) === name) || [];
        plot?.setScale("x", { min: x.min, max: x.max });
        plot?.setScale("y", { min: y.min, max: y.max });
      }
      Timeline.restore(timeline);
      if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
      const now = anchor && document.getElementById(anchor)?.getBoundingClientRect().top;
      if (now != null) scrollBy({ top: now - top, behavior: "instant" });
    };
  }

  function zoomed(plot) {
    const steps = plot.data[0];
    return plot.scales.x.min > steps[0] || plot.scales.x.max < steps[steps.length - 1];
  }

  // The section at the top of the window, and where it begins: it stays there.
  function read() {
    const above = [...document.querySelectorAll("main section[id]")]
      .map((section) => [section.id, section.getBoundingClientRect().top])
      .filter(([, top]) => top <= innerHeight / 3);
    return above.length && scrollY > 0 ? above[above.length - 1] : [null, 0];
  }

  function choose(id, text) {
    const at = [...byId(id).options].findIndex((option) => option.text === text);
    if (at >= 0) byId(id).selectedIndex = at;
  }

  async function run() {
    await poll();
    setTimeout(run, EVERY_MS);
  }
  document.addEventListener("visibilitychange", poll);
  run();
}
