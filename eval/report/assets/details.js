// SPDX-License-Identifier: Apache-2.0
// How it was run: commands, versions, hardware, study, parameters; and what did not run.

const pretty = (value) => JSON.stringify(value, null, 2);

function plainText(value) {
  if (Array.isArray(value)) return value.map(plainText).join(", ");
  if (typeof value === "number") return String(+value.toFixed(2));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function environmentCard(env) {
  const versions = Object.entries(env.versions || {})
    .map(([name, version]) => `${name} ${version}`)
    .join(", ");
  const hidden = new Set(["command", "versions", "date"]);
  const rows = [
    ["date", env.date],
    ["versions", versions],
    ...Object.entries(env).filter(([name]) => !hidden.has(name)),
  ].filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h(
    "div",
    { class: "card" },
    env.command ? h("pre", { class: "cmd mono" }, env.command) : null,
    h(
      "dl",
      { class: "defs" },
      rows.map(([name, value]) => [
        h("dt", {}, name.replaceAll("_", " ")),
        h("dd", {}, plainText(value)),
      ]),
    ),
  );
}

function speedText() {
  const found = DATA.tables
    .flatMap((table) => table.rows)
    .find((row) => Object.keys(row.measured || {}).length);
  if (!found) return null;
  const m = found.measured;
  const words = [
    m.device && `device ${m.device}`,
    m.threads && plural(m.threads, "thread"),
    m.attention && `attention ${m.attention}`,
    m.rounds && plural(m.rounds, "round"),
  ].filter(Boolean);
  return h("p", { class: "soft" }, `Times: ${words.join(", ")}; median, quartiles on hover.`);
}

function detailsSection() {
  const parameters = DATA.arms.map((arm) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, h("span", { class: "arm" }, icon(arm), armName(arm))),
      h("td", { style: { "text-align": "left" } }, arm.model),
      h("td", { class: "wide mono" }, arm.parameters),
    ),
  );
  const empty = DATA.empty.map((cell) =>
    h(
      "li",
      {},
      `${cell.label} on ${cell.model}, ${cell.task}: ${cell.refused || "no records yet"}`,
    ),
  );
  return {
    section: h(
      "section",
      { id: "run", "aria-labelledby": "run-title" },
      h("div", { class: "title" }, h("h2", { id: "run-title" }, "How it was run")),
      DATA.environments.length
        ? DATA.environments.map(environmentCard)
        : h("p", { class: "note" }, "This folder does not say what it was run on."),
      speedText(),
      empty.length
        ? h(
            "div",
            { class: "note" },
            h("p", {}, h("strong", {}, "Not in the tables:")),
            h("ul", {}, empty),
          )
        : null,
      h(
        "details",
        {},
        h("summary", {}, "Models"),
        h(
          "div",
          {},
          DATA.models.map((model) => h("pre", {}, `${model.title}\n${pretty(model.about)}`)),
        ),
      ),
      h(
        "details",
        {},
        h("summary", {}, "Methods and their parameters"),
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
                ["method", "model", "parameters"].map((name) => h("th", { scope: "col" }, name)),
              ),
            ),
            h("tbody", {}, parameters),
          ),
        ),
      ),
      h(
        "details",
        {},
        h("summary", {}, "Tasks and their options"),
        h(
          "div",
          {},
          DATA.tables.map((table) => h("pre", {}, `${table.task}: ${pretty(table.about)}`)),
        ),
      ),
      h("details", {}, h("summary", {}, "Study"), h("pre", {}, pretty(DATA.study))),
    ),
    draw() {},
  };
}
