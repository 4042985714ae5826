// SPDX-License-Identifier: Apache-2.0
// Where a method loses: by kind of question, by task, and beside published numbers.

const view = { by: null, show: "delta" };

// Orange for less, blue for more; strength grows with the difference, words stay readable.
function heat(value, most) {
  if (!known(value) || !most) return null;
  const strength = Math.min(1, Math.abs(value) / most) ** 0.8;
  return {
    background: `rgb(var(--${value < 0 ? "less" : "more"}) / ${(0.5 * strength).toFixed(3)})`,
  };
}

function segmented(name, options, draw, now = view[name]) {
  return h(
    "span",
    { class: "group", role: "group", "aria-label": name },
    Object.entries(options).map(([key, text]) =>
      h(
        "button",
        {
          class: "btn",
          type: "button",
          id: `${name}-${key}`,
          "aria-pressed": String(now === key),
          onclick: () => {
            view[name] = key;
            draw();
            document.getElementById(`${name}-${key}`)?.focus();
          },
        },
        text,
      ),
    ),
  );
}

function matrix(heads, rows, id) {
  const values = rows.flatMap((row) => row.cells.map((cell) => cell.delta?.[0])).filter(known);
  const most = Math.max(1e-9, ...values.map(Math.abs));
  const head = h(
    "tr",
    {},
    h("th", { scope: "col" }, "method"),
    heads.map((head) =>
      h(
        "th",
        { scope: "col", title: head.title },
        head.name,
        head.n ? h("div", { class: "faint small" }, `n = ${count(head.n)}`) : null,
      ),
    ),
  );
  let before = null;
  const body = rows.map((row) => {
    const method = DATA.arms[row.arm].method,
      first = before !== null && before !== method;
    before = method;
    return h(
      "tr",
      { class: first ? "break" : null },
      armCell({ arm: row.arm }),
      row.cells.map((cell) => matrixCell(cell, most)),
    );
  });
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Breakdown; scrolls sideways" },
    h("table", { class: "heat", id }, h("thead", {}, head), h("tbody", {}, body)),
  );
}

function matrixCell(cell, most) {
  const plain = view.show === "score" || !cell.delta;
  const value = plain ? cell.score : cell.delta,
    form = plain ? fixed : signed;
  const sure = cell.delta && (cell.delta[2] < 0 || cell.delta[1] > 0);
  return h(
    "td",
    {
      class: `cell${sure ? " sure" : ""}`,
      style: cell.delta ? heat(cell.delta[0], most) : null,
      title: value ? `${form(value[0])} ${ends(value, form)}` : "",
    },
    value ? form(value[0]) : "",
    cell.extra || null,
  );
}

function byKind(table) {
  const names = [...new Set(table.rows.flatMap((row) => Object.keys(row.kinds || {})))];
  if (!names.length)
    return h(
      "p",
      { class: "faint" },
      table.task === AVERAGE
        ? "Choose one task to see its kinds of questions."
        : "This task has one kind of question.",
    );
  const size = (name) => Math.max(...table.rows.map((row) => row.kinds[name]?.n || 0));
  const heads = names.map((name) => ({ name: name || "(none)", title: name, n: size(name) }));
  const rows = table.rows.map((row) => ({
    arm: row.arm,
    cells: names.map((name) => row.kinds[name] || {}),
  }));
  return matrix(heads, rows, "kinds-table");
}

function byTask(model) {
  const tables = tablesOf(model),
    average = averageOf(model);
  const arms = [...new Set(tables.flatMap((table) => table.rows.map((row) => row.arm)))];
  const all = [...(average ? [average] : []), ...groupsOf(model), ...tables];
  const heads = all.map((table) => ({
    name: table.group ? `Mean of ${table.group}` : taskName(table),
    title:
      table.group || table.task === AVERAGE
        ? "Mean of scores in % of untouched"
        : `${table.metric}, ${table.unit}`,
    n: table.samples,
  }));
  const rows = arms.map((arm) => ({
    arm,
    cells: all.map((table) => {
      const row = table.rows.find((r) => r.arm === arm);
      return row ? { score: row.score, delta: row.delta } : {};
    }),
  }));
  return matrix(heads, rows, "tasks-table");
}

function publishedTable(model) {
  const found = tablesOf(model).flatMap((table) =>
    table.rows.flatMap((row) => (row.published || []).map((entry) => ({ table, row, entry }))),
  );
  const alone = DATA.published.filter((entry) => !entry.matched);
  const cite = (entry) => [entry.source, entry.note ? ` (${entry.note})` : ""];
  const measured = ({ row, entry }) =>
    entry.metric && entry.metric !== "score" ? row.figures[entry.metric] : row.score?.[0];
  const rows = found.map(({ table, row, entry }) => {
    const here = measured({ row, entry });
    return h(
      "tr",
      {},
      armCell({ arm: row.arm }),
      h(
        "td",
        { style: { "text-align": "left" } },
        table.task,
        entry.metric && entry.metric !== "score" ? ` (${entry.metric})` : "",
      ),
      h("td", {}, fixed(here)),
      h("td", {}, fixed(entry.score)),
      h("td", {}, known(here) ? signed(here - entry.score) : ""),
      h("td", { class: "wide small" }, cite(entry)),
    );
  });
  const rest = alone.map((entry) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, entry.label),
      h("td", { style: { "text-align": "left" } }, entry.task),
      h("td", { class: "faint" }, "not run here"),
      h("td", {}, fixed(entry.score)),
      h("td", {}, ""),
      h("td", { class: "wide small" }, entry.model ? `${entry.model}; ` : "", cite(entry)),
    ),
  );
  return h(
    "div",
    {
      class: "scroll",
      tabindex: 0,
      role: "region",
      "aria-label": "Published numbers; scrolls sideways",
    },
    h(
      "table",
      { id: "published-table" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          [
            "method",
            "task",
            "measured here",
            "published",
            "measured minus published",
            "source",
          ].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h("tbody", {}, rows, rest),
    ),
  );
}

function breakdownSection() {
  const tools = h("div", { class: "tools" }),
    host = h("div", {}),
    legend = h("p", { class: "soft small" });
  function draw() {
    const table = current();
    const options = { kind: "By kind of question", task: "By task" };
    if (DATA.published.length) options.published = "Published numbers";
    if (!options[view.by]) view.by = null;
    const by = view.by || (table.task === AVERAGE ? "task" : "kind");
    tools.replaceChildren(
      segmented("by", options, draw, by),
      by === "published"
        ? ""
        : segmented("show", { delta: "Difference to untouched", score: "Score" }, draw),
    );
    host.replaceChildren(
      by === "kind"
        ? byKind(table)
        : by === "task"
          ? byTask(state.model)
          : publishedTable(state.model),
    );
    legend.textContent =
      by === "published"
        ? "Published numbers come from the study file; protocols differ between papers."
        : "Orange is a loss, blue a gain. Bold: the 95 % interval of the paired difference excludes 0. Kinds are scored as the mean per sample, in %.";
  }
  onChange(draw);
  const section = h(
    "section",
    { id: "breakdown", "aria-labelledby": "breakdown-title" },
    h("div", { class: "title" }, h("h2", { id: "breakdown-title" }, "Where it is lost"), legend),
    tools,
    host,
  );
  return { section, draw };
}
