// SPDX-License-Identifier: Apache-2.0
// Elements, numbers, colours, and what is chosen. Text from data is only ever set as text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const BLIND = "no_image";
const AVERAGE = "\u0000average";

function fill(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style")
      Object.entries(value).forEach(([k, v]) => node.style.setProperty(k, v));
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  return fill(node, children);
}

const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  make(document.createElementNS(SVG, tag), attributes, children);

// Numbers -------------------------------------------------------------------------------------

const MINUS = "\u2212";
const known = (x) => typeof x === "number" && Number.isFinite(x);
const rounded = (x, digits) => x.toFixed(digits).replace(/^-(?=[0.]*$)/, ""); // no minus zero
const fixed = (x, digits = 1) => (known(x) ? rounded(x, digits).replace("-", MINUS) : "");
const signed = (x, digits = 1) =>
  known(x) ? (rounded(x, digits).startsWith("-") ? "" : "+") + fixed(x, digits) : "";
const count = (x) => (known(x) ? x.toLocaleString("en-US") : "");
const percent = (x, digits = 1) => (known(x) ? fixed(100 * x, digits) : "");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

function ends(value, form = fixed) {
  return value && known(value[1]) ? `[${form(value[1])}, ${form(value[2])}]` : "";
}

function big(x, unit) {
  if (!known(x)) return "";
  const steps =
    unit === "B"
      ? [
          [2 ** 30, "Gi"],
          [2 ** 20, "Mi"],
          [2 ** 10, "Ki"],
        ]
      : [
          [1e12, "T"],
          [1e9, "G"],
          [1e6, "M"],
          [1e3, "k"],
        ];
  const [size, prefix] = steps.find(([size]) => Math.abs(x) >= size) || [1, ""];
  const value = x / size;
  return `${fixed(value, value >= 100 ? 0 : value >= 10 ? 1 : 2)} ${prefix}${unit}`;
}

const milliseconds = (x) => (known(x) ? `${fixed(x, x >= 100 ? 0 : 1)} ms` : "");

// Axes: what a plot may show below the score ----------------------------------------------------

function axes(table) {
  const all = [
    {
      id: "flops",
      name: "FLOPs",
      unit: "FLOP",
      label: "FLOPs per sample, all parts",
      form: (x) => big(x, "FLOP"),
    },
    {
      id: "tokens",
      name: "visual tokens",
      label: "visual tokens, mean over layers",
      form: (x) => fixed(x, x < 10 ? 1 : 0),
    },
    {
      id: "kv_bytes",
      name: "KV cache",
      unit: "B",
      label: "KV cache per sample",
      form: (x) => big(x, "B"),
    },
  ];
  const batches = [...new Set(table.rows.flatMap((row) => Object.keys(row.speed || {})))].sort(
    (a, b) => a - b,
  );
  for (const batch of batches.length ? batches : ["1"]) {
    for (const [part, name] of [
      ["total_ms", "time, total"],
      ["prefill_ms", "time to first token"],
    ]) {
      all.push({
        id: batch === "1" ? part : `${part}@${batch}`,
        batch,
        part,
        name: `${name}, batch ${batch}`,
        label: `ms, ${name}, batch ${batch}: median and quartiles`,
        form: milliseconds,
      });
    }
  }
  return all.filter((axis) => table.rows.some((row) => known(at(row, axis)[0])));
}

function at(row, axis) {
  if (axis.part && row.speed) return (row.speed[axis.batch] || {})[axis.part] || [null, null, null];
  const value = row.cost[axis.id];
  return [value, value, value];
}

// Methods: one colour and one shape each --------------------------------------------------------

const LOOKS = {
  none: ["ink", "star"],
  keep_all: ["ink", "hexagon"],
  no_image: ["gray", "cross"],
  todre: ["vermillion", "circle"],
  divprune: ["blue", "square"],
  fastv: ["green", "diamond"],
  visionzip: ["purple", "plus"],
  pyramiddrop: ["sky", "cross"],
  pool: ["orange", "up"],
  random: ["gray", "down"],
  uniform: ["yellow", "hexagon"],
};
const SPARE_COLORS = ["sky", "purple", "blue", "green", "orange", "vermillion", "yellow", "gray"];
const SPARE_SHAPES = [
  "left",
  "right",
  "hexagon",
  "square",
  "diamond",
  "circle",
  "up",
  "cross",
  "plus",
  "down",
];

const looks = (() => {
  const found = new Map();
  const names = [...new Set(DATA.arms.map((arm) => arm.method))];
  const spare = names.filter((name) => !Object.hasOwn(LOOKS, name));
  const used = new Set(
    names.filter((name) => Object.hasOwn(LOOKS, name)).map((name) => LOOKS[name][0]),
  );
  const order = [
    ...SPARE_COLORS.filter((c) => !used.has(c)),
    ...SPARE_COLORS.filter((c) => used.has(c)),
  ];
  names.forEach((name) => {
    if (Object.hasOwn(LOOKS, name)) found.set(name, LOOKS[name]);
  });
  spare.forEach((name, i) =>
    found.set(name, [order[i % order.length], SPARE_SHAPES[i % SPARE_SHAPES.length]]),
  );
  return found;
})();

const color = (arm) => `var(--c-${looks.get(arm.method)[0]})`;

function shapePath(name, r) {
  const ring = (n, turn, inner) =>
    Array.from({ length: n }, (_, i) => {
      const a = turn + (2 * Math.PI * i) / n,
        q = inner && i % 2 ? inner * r : r;
      return `${(q * Math.sin(a)).toFixed(2)},${(-q * Math.cos(a)).toFixed(2)}`;
    });
  const poly = (points) => `M${points.join("L")}Z`;
  const w = r * 0.36;
  switch (name) {
    case "square":
      return poly(ring(4, Math.PI / 4).map((p) => p));
    case "diamond":
      return poly(ring(4, 0));
    case "up":
      return poly(ring(3, 0));
    case "down":
      return poly(ring(3, Math.PI));
    case "left":
      return poly(ring(3, -Math.PI / 2));
    case "right":
      return poly(ring(3, Math.PI / 2));
    case "hexagon":
      return poly(ring(6, 0));
    case "star":
      return poly(ring(10, 0, 0.46));
    case "plus":
    case "cross": {
      const p = [
        [-w, -r],
        [w, -r],
        [w, -w],
        [r, -w],
        [r, w],
        [w, w],
        [w, r],
        [-w, r],
        [-w, w],
        [-r, w],
        [-r, -w],
        [-w, -w],
      ];
      const c = Math.SQRT1_2;
      return poly(
        p
          .map(([x, y]) => (name === "plus" ? [x, y] : [c * (x - y), c * (x + y)]))
          .map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`),
      );
    }
    default:
      return `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`;
  }
}

function glyph(arm, r = 6) {
  const shape = looks.get(arm.method)[1];
  const scale =
    {
      star: 1.45,
      circle: 0.95,
      square: 1.2,
      diamond: 1.2,
      up: 1.25,
      down: 1.25,
      left: 1.25,
      right: 1.25,
    }[shape] || 1.12;
  return s("path", {
    d: shapePath(shape, r * scale),
    fill: color(arm),
    stroke: "var(--raised)",
    "stroke-width": 1,
  });
}

function icon(arm) {
  return s(
    "svg",
    { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true" },
    glyph(arm, 5.4),
  );
}

const ROLE = { none: "no method", no_image: "no picture" };
const armName = (arm) => arm.label;

// What is chosen --------------------------------------------------------------------------------

const state = { model: DATA.models[0]?.title, task: null, hidden: new Set(), lit: null };
const listeners = [];
const onChange = (listener) => listeners.push(listener);
function change(values) {
  Object.assign(state, values);
  listeners.forEach((listener) => listener());
}

const averageOf = (model) => {
  const found = DATA.averages.find((entry) => entry.model === model && !entry.group);
  return (
    found && {
      ...found,
      task: AVERAGE,
      metric: "mean over tasks",
      unit: "% of untouched",
      floors: null,
      notes: [],
      kinds: {},
    }
  );
};
// Means over tasks of a kind: reading and grounding are lost long before the rest is.
const groupsOf = (model) => DATA.averages.filter((entry) => entry.model === model && entry.group);
const tablesOf = (model) => DATA.tables.filter((table) => table.model === model);
const current = () =>
  (state.task === AVERAGE ? averageOf(state.model) : null) ||
  tablesOf(state.model).find((table) => table.task === state.task) ||
  tablesOf(state.model)[0];
const taskName = (table) => (table.task === AVERAGE ? "All tasks" : table.task);
const baseOf = (table) => table.rows.find((row) => DATA.arms[row.arm].untouched);
// What needs neither picture nor model: name and score.
function floorsOf(table) {
  const { majority, per_kind, prior } = table.floors || {};
  const kinds = Object.keys(table.kinds).length > 1;
  return [
    ["commonest answer", majority],
    ["commonest answer of each kind", kinds ? per_kind : null],
    ["text-only prior", prior],
  ].filter(([, value]) => known(value));
}
const unitOf = (table) => (table.unit === "points" ? "points" : "%");
