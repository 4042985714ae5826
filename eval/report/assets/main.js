// SPDX-License-Identifier: Apache-2.0
// The page: head, what to know first, the sections, light and dark.

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const node = h("button", {
    class: "btn",
    type: "button",
    id: "theme",
    onclick: () => {
      chosen = (chosen ?? dark.matches) ? false : true;
      apply();
    },
  });
  function apply() {
    const on = chosen ?? dark.matches;
    document.documentElement.dataset.theme = on ? "dark" : "light";
    node.textContent = on ? "Light" : "Dark";
    node.setAttribute("aria-label", `Switch to ${on ? "light" : "dark"} colours`);
    if (ready) change({});
  }
  let ready = false;
  dark.addEventListener("change", apply);
  apply();
  ready = true;
  return node;
}

function headline() {
  const env = DATA.environments[0],
    methods = new Set(DATA.arms.filter((arm) => !arm.untouched).map((arm) => arm.method));
  const tasks = new Set(DATA.tables.map((table) => table.task));
  const words = [
    plural(DATA.models.length, "model"),
    plural(methods.size, "method"),
    plural(tasks.size, "task"),
    `${count(DATA.tables.reduce((n, t) => n + t.rows.reduce((m, r) => m + r.n, 0), 0))} records`,
  ];
  const on = env
    ? [env.gpu || env.cpu, env.versions?.torch && `torch ${env.versions.torch}`]
        .filter(Boolean)
        .join(", ")
    : "";
  return h(
    "div",
    { class: "wrap head" },
    h(
      "div",
      {},
      h("div", { class: "over" }, "visprune evaluation"),
      h("h1", {}, DATA.title),
      h("p", { class: "soft" }, [
        words.join(" · "),
        on ? ` · ${on}` : "",
        env?.date ? ` · ${String(env.date).slice(0, 10)}` : "",
      ]),
    ),
    theme(),
  );
}

function chooser() {
  const task = h("select", { id: "task", onchange: () => change({ task: task.value }) });
  const model = h("select", { id: "model", onchange: () => change({ model: model.value }) });
  function refresh() {
    const tables = tablesOf(state.model),
      average = averageOf(state.model);
    const all = average ? [average, ...tables] : tables;
    const shown = current();
    task.replaceChildren(
      ...all.map((table) =>
        h("option", { value: table.task, selected: table.task === shown.task }, taskName(table)),
      ),
    );
    model.replaceChildren(
      ...DATA.models.map((entry) =>
        h("option", { selected: entry.title === state.model }, entry.title),
      ),
    );
  }
  onChange(refresh);
  refresh();
  const links = {
    results: "Plots",
    table: "Table",
    breakdown: "Breakdown",
    samples: "Samples",
    run: "Setup",
  };
  return h(
    "div",
    { class: "bar" },
    h(
      "div",
      { class: "wrap" },
      h("label", {}, h("span", {}, "Task"), task),
      h("label", { hidden: DATA.models.length < 2 }, h("span", {}, "Model"), model),
      h(
        "nav",
        { "aria-label": "Sections" },
        Object.entries(links).map(([id, name]) => h("a", { href: `#${id}` }, name)),
      ),
    ),
  );
}

// What a reader wants to know first -------------------------------------------------------------

function glance() {
  const host = h("div", { class: "cards", id: "glance" });
  const card = (over, strong, ...text) =>
    h(
      "div",
      { class: "card" },
      h("div", { class: "over" }, over),
      h("strong", { class: "big" }, strong),
      text.map((line) => (line ? h("p", {}, line) : null)),
    );
  function draw() {
    const table = current(),
      base = baseOf(table),
      unit = unitOf(table);
    const rows = table.rows.filter((row) => row.score && !DATA.arms[row.arm].untouched);
    host.replaceChildren(
      ...[
        base?.score
          ? card(
              "Untouched model",
              `${fixed(base.score[0])} ${unit}`,
              `${table.task === AVERAGE ? "by definition" : ends(base.score)}${known(base.cost.tokens) ? ` · ${fixed(base.cost.tokens, 0)} visual tokens` : ""}`,
              [big(base.cost.flops, "FLOP"), milliseconds(base.cost.total_ms)]
                .filter(Boolean)
                .join(" · "),
            )
          : card(
              "Untouched model",
              base ? "no score" : "not run",
              "No differences can be computed.",
            ),
        cheapest(table, rows, base, card),
        smallest(rows, unit, card),
        health(table, card),
      ].filter(Boolean),
    );
  }
  onChange(draw);
  return { node: host, draw };
}

const savings = (row, base) =>
  [
    known(row.cost.flops) && known(base?.cost.flops)
      ? `${ratioText(row.cost.flops, base.cost.flops, true)} FLOPs`
      : "",
    known(row.cost.total_ms) && known(base?.cost.total_ms)
      ? `${ratioText(row.cost.total_ms, base.cost.total_ms)} as fast`
      : "",
  ]
    .filter(Boolean)
    .join(", ");

// Where no score changed, the interval is a point; 3 / n is then the largest share that may change
// unseen (the rule of three, over pictures).
const surely = (row) =>
  row.delta[1] === row.delta[2] ? row.delta[1] - 300 / row.pictures : row.delta[1];

// A wide interval that happens to hold 0 proves nothing: what counts is how much it can have lost.
function cheapest(table, rows, base, card) {
  const cost = (row) => row.cost.flops ?? row.cost.tokens;
  const title = "Cheapest, loss surely below 2 %";
  const all = rows.filter(
    (row) =>
      known(row.delta?.[1]) &&
      known(cost(row)) &&
      cost(row) < cost(base) &&
      DATA.arms[row.arm].method !== BLIND,
  );
  if (!base?.score || !all.length) return null;
  // A model that shows nothing has nothing to lose.
  const [name, floor] = floorsOf(table).reduce((a, b) => (b[1] > a[1] ? b : a), ["", -1]);
  if (base.score[1] <= floor)
    return card(title, "none", `The untouched model is not surely above the ${name},`, fixed(floor));
  const fine = all.filter((row) => surely(row) > -0.02 * base.score[0]);
  const told = (row) => `${signed(row.delta[0])} ${ends(row.delta, signed)} to untouched`;
  if (!fine.length) {
    const near = all.reduce((a, b) => (surely(b) > surely(a) ? b : a));
    return card(title, "none", `Nearest: ${armName(DATA.arms[near.arm])},`, told(near));
  }
  const row = fine.reduce((a, b) => (cost(b) < cost(a) ? b : a));
  return card(title, armName(DATA.arms[row.arm]), told(row), savings(row, base));
}

function smallest(rows, unit, card) {
  const keep = Math.min(...rows.map((row) => DATA.arms[row.arm].num_keep).filter(known));
  const there = rows
    .filter((row) => DATA.arms[row.arm].num_keep === keep)
    .sort((a, b) => b.score[0] - a.score[0]);
  const best = there.find((row) => !DATA.arms[row.arm].control),
    control = there.find((row) => DATA.arms[row.arm].control);
  if (!best) return null;
  return card(
    `Best at ${count(keep)} tokens`,
    `${armName(DATA.arms[best.arm])}: ${fixed(best.score[0])} ${unit}`,
    best.delta ? `${signed(best.delta[0])} ${ends(best.delta, signed)} to untouched` : null,
    control
      ? `Best control there: ${armName(DATA.arms[control.arm])}, ${fixed(control.score[0])}`
      : "No control ran at this budget.",
  );
}

function health(table, card) {
  const full = table.task === AVERAGE ? tablesOf(state.model).flatMap((t) => t.rows) : table.rows;
  const records = full.reduce((n, row) => n + row.n, 0),
    errors = full.reduce((n, row) => n + errorsOf(row), 0),
    unparsed = full.reduce((n, row) => n + row.unparsed, 0);
  const notes = (table.task === AVERAGE ? tablesOf(state.model) : [table]).reduce(
    (n, t) => n + t.notes.length,
    0,
  );
  return card(
    "Health of the data",
    errors ? plural(errors, "error") : "no errors",
    `${count(records)} records, ${count(unparsed)} unparsed (${percent(unparsed / Math.max(1, records - errors))} % of the answers)`,
    notes ? `${plural(notes, "remark")} below the table` : "Every arm has every sample.",
  );
}

function start() {
  document.getElementById("top").replaceChildren(headline());
  const first = averageOf(state.model);
  state.task = first ? AVERAGE : tablesOf(state.model)[0].task;
  const main = document.getElementById("main"),
    cards = glance();
  const sections = [
    plotsSection(),
    tableSection(),
    breakdownSection(),
    samplesSection(),
    detailsSection(),
  ];
  main.before(chooser());
  main.replaceChildren(
    h(
      "div",
      { class: "wrap" },
      cards.node,
      sections.map((part) => part.section),
    ),
  );
  cards.draw();
  sections.forEach((part) => part.draw());
  document
    .getElementById("foot")
    .replaceChildren(
      h(
        "div",
        { class: "wrap" },
        `Made ${DATA.made} by visprune ${DATA.visprune} from records alone. This page is one file: it loads nothing and sends nothing.`,
      ),
    );
  addEventListener("scroll", placeTip, { passive: true });
}

start();
