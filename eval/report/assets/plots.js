// SPDX-License-Identifier: Apache-2.0
// Score against cost, twice: operations and measured time, with one legend for both.

function keepText(arm) {
  const ratio = JSON.parse(arm.parameters).keep_ratio;
  if (known(ratio)) return `${+percent(ratio, 2)} % of tokens kept`;
  return known(arm.num_keep)
    ? `${count(arm.num_keep)} tokens kept`
    : arm.untouched
      ? "all tokens"
      : ROLE[arm.method] || "no token budget";
}

function ratioText(value, base, saved) {
  if (!known(value) || !known(base) || !base || !value) return "";
  return saved ? `${signed(100 * (value / base - 1), 0)} %` : `${fixed(base / value, 2)}×`;
}

function describe(row, table, axis) {
  const arm = DATA.arms[row.arm],
    unit = unitOf(table);
  const parts = [
    `${armName(arm)}, ${keepText(arm)}`,
    `score ${fixed(row.score[0])} ${unit}, interval ${fixed(row.score[1])} to ${fixed(row.score[2])}`,
  ];
  if (row.delta)
    parts.push(
      `paired difference to untouched ${signed(row.delta[0])}, interval ${signed(row.delta[1])} to ${signed(row.delta[2])}`,
    );
  parts.push(`${axis.name} ${axis.form(at(row, axis)[0])}`);
  return parts.join("; ");
}

function tipFor(row, table, onFront) {
  const arm = DATA.arms[row.arm],
    base = baseOf(table),
    facts = [];
  const add = (name, value, extra) => {
    if (value)
      facts.push(
        h("dt", {}, name),
        h("dd", {}, value, extra ? h("span", { class: "faint" }, ` ${extra}`) : null),
      );
  };
  add(table.task === AVERAGE ? "mean score" : "score", `${fixed(row.score[0])} ${ends(row.score)}`);
  add("vs untouched", row.delta ? `${signed(row.delta[0])} ${ends(row.delta, signed)}` : "");
  add("tokens", fixed(row.cost.tokens));
  add(
    "FLOPs",
    big(row.cost.flops, ""),
    arm.untouched ? "" : ratioText(row.cost.flops, base?.cost.flops, true),
  );
  add(
    "time, total",
    milliseconds(row.cost.total_ms),
    arm.untouched ? "" : ratioText(row.cost.total_ms, base?.cost.total_ms),
  );
  add(
    "first token",
    milliseconds(row.cost.prefill_ms),
    arm.untouched ? "" : ratioText(row.cost.prefill_ms, base?.cost.prefill_ms),
  );
  add("KV cache", big(row.cost.kv_bytes, "B"));
  return h(
    "div",
    {},
    h(
      "span",
      { class: "arm" },
      icon(arm),
      h("strong", {}, armName(arm)),
      arm.control ? h("span", { class: "badge" }, "control") : null,
    ),
    h(
      "div",
      { class: "faint" },
      keepText(arm),
      onFront ? ` · on the front of score against ${onFront}` : "",
    ),
    h("dl", {}, facts),
  );
}

function plotsSection() {
  const legend = h("ul", { class: "legend", "aria-label": "Methods; press to hide or show" });
  const picks = [{ axis: "flops" }, { axis: "total_ms" }];
  const cards = picks.map((pick, i) => {
    const select = h("select", {
      id: `axis-${i}`,
      "aria-label": `Cost axis of plot ${i + 1}`,
      onchange: () => {
        pick.axis = select.value;
        draw();
      },
    });
    const heading = h("h3", {}, "Score against");
    const plot = h("div", { id: `plot-${i}` });
    Object.assign(pick, { select, heading, plot });
    return h("div", { class: "card chart" }, h("header", {}, heading, select), plot);
  });
  const empty = h("p", { class: "note", hidden: true });
  function draw() {
    const table = current(),
      all = axes(table);
    legend.replaceChildren(...legendKeys(table, draw));
    picks.forEach((pick, i) => {
      const usable = all.filter((axis) => axis.id === pick.axis);
      const axis = usable[0] || all[Math.min(i, all.length - 1)];
      pick.select.replaceChildren(
        ...all.map((a) => h("option", { value: a.id, selected: a === axis }, a.name)),
      );
      pick.plot.closest(".card").hidden = !axis;
      if (!axis) return;
      drawPlot(pick.plot, table, axis, `Score against ${axis.name}`);
    });
    const timed = table.rows.some((row) => known(row.cost.total_ms) || known(row.cost.prefill_ms));
    empty.hidden = timed && all.length > 0;
    empty.textContent = all.length
      ? "No latency was measured in this folder; the second plot shows another cost."
      : "These records hold no cost: no operations, tokens or times were noted.";
  }
  onChange(draw);
  let timer = null,
    last = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== last) {
      last = innerWidth;
      clearTimeout(timer);
      timer = setTimeout(draw, 80);
    }
  });
  const section = h(
    "section",
    { id: "results", "aria-labelledby": "results-title" },
    h(
      "div",
      { class: "title" },
      h("h2", { id: "results-title" }, "Score against cost"),
      h(
        "p",
        { class: "soft small" },
        "Up and to the left is better. Bars are 95 % intervals; the gold band is the Pareto front; dashed lines are controls.",
      ),
    ),
    legend,
    empty,
    h("div", { class: "two" }, cards),
  );
  return { section, draw };
}

function legendKeys(table, draw) {
  const methods = [...new Set(table.rows.map((row) => DATA.arms[row.arm].method))];
  const keys = methods.map((name) => {
    const arm = DATA.arms.find((a) => a.method === name),
      shown = !state.hidden.has(name);
    const key = h(
      "button",
      { class: "key", type: "button", "aria-pressed": String(shown), "data-key": name },
      icon(arm),
      arm.untouched ? "untouched" : name,
      arm.control ? h("span", { class: "badge" }, "control") : null,
    );
    key.addEventListener("click", () => {
      if (shown) state.hidden.add(name);
      else state.hidden.delete(name);
      draw();
      document.querySelectorAll("[data-key]").forEach((other) => {
        if (other.dataset.key === name) other.focus();
      });
    });
    return h("li", {}, key);
  });
  return keys;
}

function drawPlot(host, table, axis, title) {
  const points = table.rows
    .filter(
      (row) =>
        row.score &&
        known(at(row, axis)[0]) &&
        DATA.arms[row.arm].method !== BLIND && // a level, not a way to see with less
        !state.hidden.has(DATA.arms[row.arm].method),
    )
    .map((row) => {
      const [x, x0, x1] = at(row, axis),
        [y, y0, y1] = row.score;
      return { row, arm: DATA.arms[row.arm], x, x0, x1, y, y0, y1 };
    });
  if (!points.length) {
    host.replaceChildren(
      h("p", { class: "faint" }, "Nothing to show: every method is hidden, or none has this cost."),
    );
    return;
  }
  drawChart(host, { points, axis, table, title, levels: levelsOf(table) });
}

// Heights to compare with: the untouched model, and what needs no picture.
function levelsOf(table) {
  const found = [],
    base = baseOf(table),
    blind = table.rows.find((row) => DATA.arms[row.arm].method === BLIND);
  if (base?.score && !state.hidden.has(DATA.arms[base.arm].method))
    found.push({ value: base.score[0], kind: "base", name: "untouched" });
  if (blind?.score && !state.hidden.has(BLIND))
    found.push({ value: blind.score[0], kind: "floor", name: "without the picture" });
  for (const [name, value] of floorsOf(table)) found.push({ value, kind: "floor", name });
  return found;
}
