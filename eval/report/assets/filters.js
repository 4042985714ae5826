// SPDX-License-Identifier: Apache-2.0
// What chooses samples: search, filter, task, kind, and the methods that stand side by side.

function sampleTools(update) {
  const search = h("input", {
    type: "search",
    id: "sample-search",
    placeholder: "Search questions and answers",
    "aria-label": "Search questions and answers",
    oninput: () => {
      seen.text = search.value.toLowerCase();
      update();
    },
  });
  const pick = (id, label, set) => {
    const node = h("select", {
      id,
      "aria-label": label,
      onchange: () => {
        set(node.value);
        update();
      },
    });
    return node;
  };
  const filter = pick("sample-filter", "Which samples", (v) => {
    seen.filter = v;
  });
  const task = pick("sample-task", "Task", (v) => {
    seen.task = v;
    seen.kind = "";
    refresh();
  });
  const kind = pick("sample-kind", "Kind of question", (v) => {
    seen.kind = v;
  });
  const veil = h(
    "button",
    {
      class: "btn",
      type: "button",
      id: "veil",
      "aria-pressed": "true",
      onclick: () => {
        const on = veil.getAttribute("aria-pressed") !== "true";
        veil.setAttribute("aria-pressed", String(on));
        document.getElementById("sample-detail").classList.toggle("veiloff", !on);
      },
    },
    "Veil dropped patches",
  );
  const methods = h("details", { class: "small" });
  const option = (value, text, chosen) => h("option", { value, selected: chosen }, text);
  function refresh() {
    filter.replaceChildren(
      ...Object.entries(FILTERS).map(([key, [name]]) => option(key, name, key === seen.filter)),
    );
    task.replaceChildren(
      option("", "all tasks", !seen.task),
      ...DATA.chosen.map((group, i) => option(String(i), group.task, String(i) === seen.task)),
    );
    task.hidden = DATA.chosen.length < 2;
    const kinds = [
      ...new Set(
        DATA.samples.filter((x) => !seen.task || String(x.task) === seen.task).map((x) => x.kind),
      ),
    ]
      .filter(Boolean)
      .sort();
    kind.replaceChildren(
      option("", "all kinds", !seen.kind),
      ...kinds.map((name) => option(name, name, name === seen.kind)),
    );
    kind.hidden = kinds.length < 2;
    methods.replaceChildren(...armChoice(update));
  }
  return {
    node: h("div", {}, h("div", { class: "tools" }, search, filter, task, kind, veil), methods),
    refresh,
  };
}

// All arms of the model stand side by side; who compares a few unticks the others.
function armChoice(update) {
  const all = DATA.arms
    .map((arm, i) => i)
    .filter((i) => DATA.arms[i].model === state.model && DATA.samples.some((x) => x.got[i]));
  seen.methods = new Set(all);
  const boxes = all.map((i) => {
    const box = h("input", { type: "checkbox", checked: true, "data-pick": i });
    box.addEventListener("change", () => {
      if (box.checked) seen.methods.add(i);
      else seen.methods.delete(i);
      update();
    });
    return [box, h("label", { class: "key" }, box, icon(DATA.arms[i]), armName(DATA.arms[i]))];
  });
  const set = (want) =>
    h("button", {
      class: "btn",
      type: "button",
      onclick: () => {
        boxes.forEach(([box], j) => {
          box.checked = want(DATA.arms[all[j]]);
          if (box.checked) seen.methods.add(all[j]);
          else seen.methods.delete(all[j]);
        });
        update();
      },
    });
  const budgets = [...new Set(all.map((i) => DATA.arms[i].num_keep).filter(known))].sort(
    (a, b) => b - a,
  );
  const quick = [
    fill(
      set(() => true),
      ["all"],
    ),
    ...budgets.map((keep) =>
      fill(
        set((arm) => arm.untouched || arm.num_keep === keep),
        [`only ${count(keep)} tokens`],
      ),
    ),
  ];
  return [
    h("summary", {}, "Methods to compare"),
    h(
      "div",
      { class: "tools" },
      quick,
      boxes.map((pair) => pair[1]),
    ),
  ];
}
