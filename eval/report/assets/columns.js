// SPDX-License-Identifier: Apache-2.0
// The columns of the big table: what each shows, and what it sorts by.

const TIME_NAMES = {
  vision_ms: "vision",
  selection_ms: "selection",
  prefill_ms: "first token",
  decode_ms_per_token: "per new token",
};

function armCell(row) {
  const arm = DATA.arms[row.arm];
  return h(
    "th",
    { scope: "row" },
    h(
      "span",
      { class: "arm" },
      icon(arm),
      armName(arm),
      arm.control ? h("span", { class: "badge" }, "control") : null,
      (row.pareto || []).includes("flops")
        ? h(
            "span",
            {
              class: "badge gold",
              title: "On the Pareto front: no arm scores as high for fewer FLOPs",
            },
            "Pareto",
          )
        : null,
    ),
  );
}

function stacked(row, most) {
  const parts = Object.entries(row.flops || {});
  return h(
    "span",
    { class: "bars", "aria-hidden": "true" },
    parts.map(([part, value]) =>
      h("i", { style: { width: `${(100 * value) / most}%`, background: partColor(part) } }),
    ),
  );
}

// A difference on a common scale: zero in the middle grey, the interval as a bar.
function forest(delta, low, high, arm) {
  const w = 100,
    x = (v) => 3 + ((v - low) / (high - low || 1)) * (w - 6);
  return s(
    "svg",
    { width: w, height: 16, "aria-hidden": "true" },
    s("line", {
      x1: x(0),
      x2: x(0),
      y1: 0,
      y2: 16,
      stroke: "var(--faint)",
      "stroke-dasharray": "2 2",
    }),
    s("line", {
      x1: x(delta[1]),
      x2: x(delta[2]),
      y1: 8,
      y2: 8,
      stroke: color(arm),
      "stroke-width": 5,
      "stroke-opacity": 0.35,
    }),
    s("circle", { cx: x(delta[0]), cy: 8, r: 3.6, fill: color(arm) }),
  );
}

function columnsOf(table) {
  const rows = table.rows,
    some = (get) => rows.some((row) => known(get(row)));
  const deltas = rows.flatMap((row) => row.delta || []).filter(known);
  const low = Math.min(0, ...deltas),
    high = Math.max(0, ...deltas);
  const most = Math.max(...rows.map((row) => row.cost.flops || 0)),
    base = baseOf(table);
  const [size, prefix] = [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
  ].find(([size]) => most >= size) || [1, ""];
  const inUnit = (x) => (known(x) ? fixed(x / size, 2) : "");
  const withCi = (value, form = fixed) =>
    value ? [form(value[0]), " ", h("span", { class: "ci" }, ends(value, form))] : "";
  const list = [
    {
      key: "score",
      name: `score, ${table.unit}`,
      get: (r) => r.score?.[0],
      show: (r) => withCi(r.score),
    },
    {
      key: "delta",
      name: "difference to untouched",
      get: (r) => r.delta?.[0],
      show: (r) =>
        r.delta
          ? [
              forest(r.delta, low, high, DATA.arms[r.arm]),
              h("span", { class: "both" }, withCi(r.delta, signed)),
            ]
          : "",
    },
    { key: "n", name: "n", get: (r) => r.n, show: (r) => count(r.n) },
    {
      key: "tokens",
      name: "tokens",
      title: "Visual tokens in the mean over decoder layers",
      get: (r) => r.cost.tokens,
      show: (r) => fixed(r.cost.tokens),
    },
    {
      key: "flops",
      name: `${prefix}FLOPs`,
      title: "Two per multiply-add, all parts, per sample",
      get: (r) => r.cost.flops,
      show: (r) => [stacked(r, most), inUnit(r.cost.flops)],
    },
  ];
  const parts = [...new Set(rows.flatMap((r) => Object.keys(r.flops || {})))];
  if (opened.flops)
    parts.forEach((part) =>
      list.push({
        key: `flops ${part}`,
        name: partName(part),
        part: true,
        get: (r) => r.flops[part],
        show: (r) => inUnit(r.flops[part] ?? 0),
      }),
    );
  list.push({
    key: "total",
    name: "time, total",
    title: "Median at the smallest batch that was measured",
    get: (r) => r.cost.total_ms,
    show: (r) => milliseconds(r.cost.total_ms),
  });
  list.push({
    key: "speedup",
    name: "speed-up",
    get: (r) => (known(r.cost.total_ms) && base ? base.cost.total_ms / r.cost.total_ms : null),
    show: (r) => ratioText(r.cost.total_ms, base?.cost.total_ms),
  });
  if (opened.time) list.push(...timeColumns(rows));
  list.push(
    {
      key: "kv",
      name: "KV cache",
      get: (r) => r.cost.kv_bytes,
      show: (r) => big(r.cost.kv_bytes, "B"),
    },
    {
      key: "peak",
      name: "peak GPU memory",
      title: "At the first batch size",
      get: (r) => r.peak,
      show: (r) => big(r.peak, "B"),
    },
    {
      key: "agree",
      name: "agreement %",
      title: "Answers equal to the untouched model's (loyalty)",
      get: (r) => r.agreement,
      show: (r) => percent(r.agreement),
    },
    {
      key: "unparsed",
      name: "unparsed %",
      title: "Outputs that no rule could read",
      get: (r) => (r.answered ? r.unparsed / r.answered : null),
      show: (r) => (r.answered ? percent(r.unparsed / r.answered) : ""),
    },
    {
      key: "yes",
      name: "yes %",
      title: "Share of yes among answers to yes-no questions",
      get: (r) => r.yes,
      show: (r) => percent(r.yes),
    },
    { key: "errors", name: "errors", get: errorsOf, show: (r) => (r.errors ? errorCell(r) : "") },
  );
  if (rows.some((r) => errorsOf(r)))
    list.push({
      key: "wrong",
      name: "score, errors wrong",
      title: "Samples with an error scored 0",
      get: (r) => r.errors_wrong,
      show: (r) => fixed(r.errors_wrong),
    });
  list.push({
    key: "sd",
    name: "sd over seeds",
    get: (r) => r.spread,
    show: (r) => (known(r.spread) ? `${fixed(r.spread, 2)} (${r.seeds.length})` : ""),
  });
  list.push({
    key: "published",
    name: "published",
    get: (r) => r.published?.[0]?.score,
    show: (r) => (r.published || []).map((p) => fixed(p.score)).join(", "),
  });
  return list.filter((column) => some(column.get));
}

function timeColumns(rows) {
  const batches = [...new Set(rows.flatMap((r) => Object.keys(r.speed || {})))].sort(
    (a, b) => a - b,
  );
  const found = [];
  for (const batch of batches) {
    for (const part of DATA.time_parts) {
      if (batch === "1" && part === "total_ms") continue;
      const get = (r) => r.speed?.[batch]?.[part]?.[0];
      const name = `${TIME_NAMES[part] || "total"}${batch === "1" ? "" : `, batch ${batch}`}`;
      found.push({
        key: `time ${batch} ${part}`,
        name,
        part: true,
        get,
        show: (r) =>
          known(get(r))
            ? h(
                "span",
                {
                  title: `quartiles ${fixed(r.speed[batch][part][1])} to ${fixed(r.speed[batch][part][2])} ms`,
                },
                milliseconds(get(r)),
              )
            : "",
      });
    }
  }
  return found;
}

const errorsOf = (row) =>
  row.errors ? Object.values(row.errors).reduce((a, b) => a + b, 0) : null;

function errorCell(row) {
  const total = errorsOf(row);
  const title = Object.entries(row.errors)
    .map(([type, n]) => `${n} ${type}`)
    .join(", ");
  return total ? h("span", { class: "badge warn", title }, count(total)) : "0";
}
