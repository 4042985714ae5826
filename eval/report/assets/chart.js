// SPDX-License-Identifier: Apache-2.0
// A scatter with lines, intervals and a Pareto front, as SVG; one tab stop, arrows move within.

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1)
    found.push(i * step);
  return found;
}

// One prefix for the whole axis: numbers on the ticks, the unit in the label.
function unitOfAxis(axis, most) {
  const steps =
    axis.unit === "B"
      ? [
          [2 ** 30, "Gi"],
          [2 ** 20, "Mi"],
          [2 ** 10, "Ki"],
        ]
      : axis.unit === "FLOP"
        ? [
            [1e12, "T"],
            [1e9, "G"],
            [1e6, "M"],
            [1e3, "k"],
          ]
        : [];
  const [size, prefix] = steps.find(([size]) => most >= size) || [1, ""];
  return {
    size,
    name: axis.label
      .replace(/^FLOPs/, `${prefix}FLOPs`)
      .replace(/\bKV cache\b/, `KV cache, ${prefix}B,`),
  };
}

function front(points) {
  return points
    .filter((p) => !points.some((q) => q.x <= p.x && q.y >= p.y && (q.x < p.x || q.y > p.y)))
    .sort((a, b) => a.x - b.x);
}

function spread(labels, low, high, gap) {
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => {
    label.at = i ? Math.max(label.y, labels[i - 1].at + gap) : Math.max(label.y, low);
  });
  for (let i = labels.length - 1; i >= 0; i -= 1) {
    labels[i].at = Math.min(labels[i].at, i === labels.length - 1 ? high : labels[i + 1].at - gap);
  }
}

function bounds(values, pad) {
  const low = Math.min(...values),
    high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * pad;
  return [low - room, high + room];
}

// spec: {points: [{row, arm, x, x0, x1, y, y0, y1}], axis, table, levels: [{value, kind, name}], title}
function drawChart(host, spec) {
  const width = Math.max(280, host.clientWidth || 560),
    narrow = width < 460;
  const height = narrow ? 300 : 380;
  const names = [...new Set(spec.points.map((p) => p.arm.method))];
  const box = { left: 46, right: width - 12, top: 14, bottom: height - 46 };
  const scale = scales(spec, box, narrow);
  const root = s("svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "group",
    "aria-label": `${spec.title}. ${plural(spec.points.length, "point")}; arrow keys move between them.`,
  });
  root.append(...backdrop(spec, scale, box, narrow));
  const best = front(spec.points);
  if (best.length > 1) root.append(frontPath(best, scale));
  for (const name of names) root.append(...methodLine(name, spec.points, scale));
  for (const point of spec.points) root.append(bars(point, scale));
  const dots = spec.points
    .slice()
    .sort((a, b) => a.x - b.x || a.y - b.y)
    .map((point) => dot(point, scale, best.includes(point), spec));
  root.append(...dots);
  if (!narrow) root.append(...nameLabels(names, spec.points, scale, box));
  rove(dots);
  host.replaceChildren(root);
}

function scales(spec, box, narrow) {
  const xs = spec.points.flatMap((p) => [p.x, p.x0, p.x1]).filter(known);
  const ys = spec.points.flatMap((p) => [p.y, p.y0, p.y1]).filter(known);
  let [x0, x1] = bounds(xs, 0.02),
    [y0, y1] = bounds(ys, 0.05);
  for (const { value } of spec.levels) {
    if (value < y0 && y0 - value < 0.35 * (y1 - y0)) y0 = value - 0.04 * (y1 - y0);
    if (value > y1 && value - y1 < 0.35 * (y1 - y0)) y1 = value + 0.06 * (y1 - y0);
  }
  if (Math.max(...ys) <= 100 && y1 > 100) y1 = 100.5;
  const names = spec.points.filter((p) => !p.arm.untouched).map((p) => p.arm.method.length);
  const left = narrow ? 10 : 18 + 7.6 * Math.min(16, Math.max(0, ...names)),
    right = narrow ? 10 : 14;
  const x = (v) => box.left + left + ((v - x0) / (x1 - x0)) * (box.right - box.left - left - right);
  const y = (v) => box.bottom - ((v - y0) / (y1 - y0)) * (box.bottom - box.top);
  return { x, y, x0, x1, y0, y1 };
}

function backdrop(spec, scale, box, narrow) {
  const parts = [];
  const unit = unitOfAxis(spec.axis, scale.x1);
  const xt = ticks(scale.x0 / unit.size, scale.x1 / unit.size, narrow ? 4 : 7).map(
      (v) => v * unit.size,
    ),
    yt = ticks(scale.y0, scale.y1, 8);
  for (const v of yt) {
    parts.push(
      s("line", { class: "grid", x1: box.left, x2: box.right, y1: scale.y(v), y2: scale.y(v) }),
    );
    parts.push(
      s("text", { x: box.left - 7, y: scale.y(v) + 4, "text-anchor": "end" }, +v.toPrecision(4)),
    );
  }
  for (const v of xt) {
    parts.push(
      s("line", { class: "grid", x1: scale.x(v), x2: scale.x(v), y1: box.top, y2: box.bottom }),
    );
    parts.push(
      s(
        "text",
        { x: scale.x(v), y: box.bottom + 18, "text-anchor": "middle" },
        +(v / unit.size).toPrecision(4),
      ),
    );
  }
  parts.push(
    s("line", { class: "frame", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
  );
  parts.push(
    s("text", { class: "axis", x: box.right, y: box.bottom + 38, "text-anchor": "end" }, unit.name),
  );
  parts.push(...levels(spec, scale, box));
  return parts;
}

// Names of heights that lie close together stand in a row; the caption of the table has those that
// find no place.
function levels(spec, scale, box) {
  const parts = [],
    placed = [];
  for (const { value, kind, name } of spec.levels) {
    if (value <= scale.y0 || value > scale.y1) continue;
    const y = scale.y(value),
      text = `${name} ${fixed(value)}`;
    const beside = placed.filter((other) => Math.abs(other.y - y) < 15);
    const x = Math.max(box.left + 4, ...beside.map((other) => other.end + 12)),
      end = x + 6.5 * text.length;
    parts.push(s("line", { class: kind, x1: box.left, x2: box.right, y1: y, y2: y }));
    if (end > box.right && beside.length) continue;
    placed.push({ y, end });
    parts.push(s("text", { class: "axis level", x, y: y - 5 }, text));
  }
  return parts;
}

function frontPath(best, scale) {
  const path = best
    .map((p, i) => (i ? `H${scale.x(p.x)}V${scale.y(p.y)}` : `M${scale.x(p.x)},${scale.y(p.y)}`))
    .join("");
  return s("path", { class: "front", d: path });
}

function methodLine(name, points, scale) {
  const mine = points
    .filter((p) => p.arm.method === name && !p.arm.untouched)
    .sort((a, b) => a.x - b.x);
  if (mine.length < 2) return [];
  const d = mine.map((p, i) => `${i ? "L" : "M"}${scale.x(p.x)},${scale.y(p.y)}`).join("");
  return [
    s("path", {
      class: "line",
      "data-method": name,
      d,
      fill: "none",
      stroke: color(mine[0].arm),
      "stroke-width": 1.8,
      "stroke-dasharray": mine[0].arm.control ? "4 3" : null,
    }),
  ];
}

function bars(point, scale) {
  const x = scale.x(point.x),
    y = scale.y(point.y),
    lines = [];
  if (known(point.y0)) lines.push([x, x, scale.y(point.y0), scale.y(point.y1)]);
  if (known(point.x0) && point.x1 > point.x0)
    lines.push([scale.x(point.x0), scale.x(point.x1), y, y]);
  return s(
    "g",
    {
      class: "line",
      "data-method": point.arm.method,
      stroke: color(point.arm),
      "stroke-width": 2,
      "stroke-opacity": 0.5,
      "stroke-linecap": "round",
    },
    lines.map(([x1, x2, y1, y2]) => s("line", { x1, x2, y1, y2 })),
  );
}

function dot(point, scale, best, spec) {
  const label = describe(point.row, spec.table, spec.axis);
  const node = s(
    "g",
    {
      class: `pt${best ? " on-front" : ""}`,
      transform: `translate(${scale.x(point.x)},${scale.y(point.y)})`,
      tabindex: -1,
      role: "img",
      "aria-label": label + (best ? ". On the Pareto front" : ""),
      "data-arm": point.row.arm,
      "data-method": point.arm.method,
    },
    s("circle", { r: 15, fill: "transparent" }),
    s("circle", { class: "ring", r: 10.5 }),
    glyph(point.arm, 5.6),
  );
  const show = () => {
    light(point.row.arm);
    showTip(node, tipFor(point.row, spec.table, best ? spec.axis.name : null));
  };
  const hide = () => {
    light(null);
    hideTip();
  };
  node.addEventListener("pointerenter", show);
  node.addEventListener("pointerleave", () => {
    if (document.activeElement !== node) hide();
  });
  node.addEventListener("focus", show);
  node.addEventListener("blur", hide);
  node.addEventListener("click", () => node.focus());
  return node;
}

// One tab stop for the whole chart: the arrows go from point to point, left to right.
function rove(dots) {
  if (!dots.length) return;
  dots[0].setAttribute("tabindex", 0);
  dots.forEach((node, i) =>
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next =
        event.key === "Home"
          ? 0
          : event.key === "End"
            ? dots.length - 1
            : step
              ? (i + step + dots.length) % dots.length
              : null;
      if (event.key === "Escape") hideTip();
      if (next === null) return;
      event.preventDefault();
      dots.forEach((other, j) => other.setAttribute("tabindex", j === next ? 0 : -1));
      dots[next].focus();
    }),
  );
}

function nameLabels(names, points, scale, box) {
  const labels = names
    .map((name) => {
      const mine = points
        .filter((p) => p.arm.method === name && !p.arm.untouched)
        .sort((a, b) => a.x - b.x);
      return mine.length
        ? { name, arm: mine[0].arm, x: scale.x(mine[0].x), y: scale.y(mine[0].y) }
        : null;
    })
    .filter(Boolean);
  spread(labels, box.top + 8, box.bottom - 6, 15);
  return labels.map((label) =>
    s(
      "text",
      {
        class: "name line",
        "data-method": label.name,
        x: label.x - 13,
        y: label.at + 4,
        "text-anchor": "end",
        style: { fill: `color-mix(in srgb, ${color(label.arm)} 72%, var(--ink))` },
      },
      label.name.length > 16 ? `${label.name.slice(0, 15)}…` : label.name,
    ),
  );
}
