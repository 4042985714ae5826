// SPDX-License-Identifier: Apache-2.0
// The table of one task: everything about every arm; headers sort, parts unfold.

const PART_NAMES = { lm_head: "output head" };
const partName = (part) => PART_NAMES[part] || part.replaceAll("_", " ");
const partColor = (part) => (DATA.flop_parts.includes(part) ? `var(--p-${part})` : "var(--faint)");
const opened = { flops: false, time: false };
let sorting = { key: null, down: true };

function sortedRows(table, columns) {
  const column = columns.find((c) => c.key === sorting.key);
  if (!column) return table.rows;
  const sign = sorting.down ? -1 : 1;
  const value = (row) =>
    known(column.get(row)) ? column.get(row) : sorting.down ? -Infinity : Infinity;
  return table.rows.slice().sort((a, b) => sign * (value(a) - value(b)) || 0);
}

function tableSection() {
  const host = h("div", {
    class: "scroll",
    tabindex: 0,
    role: "region",
    "aria-label": "Results table; scrolls sideways",
  });
  const caption = h("p", { class: "soft small" }),
    tools = h("div", { class: "tools" }),
    notes = h("div", {}),
    key = h("div", { class: "partkey" });
  const figures = h("div", {});
  function draw() {
    const table = current(),
      columns = columnsOf(table);
    caption.textContent = captionOf(table);
    tools.replaceChildren(...toggles(table, draw));
    host.replaceChildren(grid(table, columns, draw));
    const parts = [...new Set(table.rows.flatMap((r) => Object.keys(r.flops || {})))];
    key.replaceChildren(
      ...(parts.length ? [h("span", {}, "FLOPs by part:")] : []),
      ...parts.map((part) =>
        h("span", {}, h("i", { style: { background: partColor(part) } }), partName(part)),
      ),
    );
    notes.replaceChildren(
      ...(table.notes || []).map((note) => h("p", { class: "note small" }, note)),
    );
    figures.replaceChildren(...alsoReported(table));
  }
  onChange(draw);
  const section = h(
    "section",
    { id: "table", "aria-labelledby": "table-title" },
    h("div", { class: "title" }, h("h2", { id: "table-title" }, "All numbers"), caption),
    tools,
    host,
    key,
    notes,
    figures,
    h(
      "details",
      {},
      h("summary", {}, "How to read this"),
      h(
        "div",
        { class: "soft" },
        h("p", {}, DATA.how),
        h("p", {}, DATA.how_floors),
        h(
          "p",
          {},
          `${count(DATA.resamples)} draws of whole pictures (200 where the score is no mean over samples). Many intervals stand on this page: of twenty differences that are truly zero, one interval of 95 % is expected to miss zero. Bits in a picture mark the tokens that survive; where a method merges, the patch that the merged token stands at. What lies outside a dashed frame was cut off before the model saw it.`,
        ),
      ),
    ),
  );
  return { section, draw };
}

function captionOf(table) {
  if (table.task === AVERAGE)
    return "Score in percent of the untouched model's, mean over tasks; every task counts the same. Costs are means over tasks.";
  const yes = table.rows.find((row) => known(row.yes_wanted));
  const words = [
    `${table.metric}, ${plural(table.samples, "sample")} of ${plural(table.pictures, "picture")}`,
  ];
  if (table.prompt_style) words.push(`prompts: ${table.prompt_style}`);
  const blind = table.rows.find((row) => DATA.arms[row.arm].method === BLIND);
  if (blind?.score) words.push(`without the picture: ${fixed(blind.score[0])}`);
  for (const [name, value] of floorsOf(table)) words.push(`${name}: ${fixed(value)}`);
  if (yes) words.push(`yes among references: ${percent(yes.yes_wanted)} %`);
  return `${words.join(" · ")}.`;
}

function toggles(table, draw) {
  const has = {
    flops: table.rows.some((r) => Object.keys(r.flops || {}).length),
    time: table.rows.some((r) => Object.keys(r.speed || {}).length),
  };
  const names = { flops: "FLOPs by part", time: "Time by part" };
  return Object.keys(names)
    .filter((name) => has[name])
    .map((name) =>
      h(
        "button",
        {
          class: "btn",
          type: "button",
          id: `unfold-${name}`,
          "aria-pressed": String(opened[name]),
          onclick: () => {
            opened[name] = !opened[name];
            draw();
            document.getElementById(`unfold-${name}`)?.focus();
          },
        },
        names[name],
      ),
    );
}

function grid(table, columns, draw) {
  const sort = (column) => {
    sorting =
      sorting.key === column.key
        ? sorting.down
          ? { key: column.key, down: false }
          : { key: null, down: true }
        : { key: column.key, down: true };
    draw();
    document.querySelector(`[data-sort="${CSS.escape(column.key)}"]`)?.focus();
  };
  const head = h(
    "tr",
    {},
    h("th", { scope: "col" }, "method"),
    columns.map((column) =>
      h(
        "th",
        {
          scope: "col",
          class: column.part ? "part" : null,
          title: column.title,
          "aria-sort":
            sorting.key === column.key ? (sorting.down ? "descending" : "ascending") : null,
        },
        h(
          "button",
          { type: "button", "data-sort": column.key, onclick: () => sort(column) },
          column.name,
        ),
      ),
    ),
  );
  let before = null;
  const body = sortedRows(table, columns).map((row) => {
    const method = DATA.arms[row.arm].method,
      first = before !== null && before !== method && sorting.key === null;
    before = method;
    return h(
      "tr",
      {
        class: first ? "break" : null,
        "data-arm": row.arm,
        onpointerenter: () => light(row.arm),
        onpointerleave: () => light(null),
      },
      armCell(row),
      columns.map((column) => h("td", { class: column.part ? "part" : null }, column.show(row))),
    );
  });
  return h("table", { id: "results-table" }, h("thead", {}, head), h("tbody", {}, body));
}

// What a task reports beside its score: accuracy plus, F1 by split and the like.
function alsoReported(table) {
  const names = [...new Set(table.rows.flatMap((row) => Object.keys(row.figures || {})))].filter(
    (name) => name !== "score" && !name.startsWith("score/"),
  );
  if (!names.length) return [];
  return [
    h(
      "details",
      {},
      h("summary", {}, `Also reported by this task (${names.length})`),
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, "method"),
              names.map((name) => h("th", { scope: "col" }, name)),
            ),
          ),
          h(
            "tbody",
            {},
            table.rows.map((row) =>
              h(
                "tr",
                {},
                armCell(row),
                names.map((name) => h("td", {}, fixed(row.figures[name], 2))),
              ),
            ),
          ),
        ),
      ),
    ),
  ];
}
