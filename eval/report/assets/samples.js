// SPDX-License-Identifier: Apache-2.0
// Single samples: picture, question, the answers of all methods, and what each still saw.

const FILTERS = {
  all: ["all samples", () => true],
  disagree: [
    "methods disagree",
    (sample, arms) =>
      new Set(
        answersOf(sample, arms).map(
          (got) => got.answer ?? `\u0000${got.error ? "error" : got.text}`,
        ),
      ).size > 1,
  ],
  lost: [
    "untouched right, some method wrong",
    (sample, arms) =>
      rightOf(whole(sample)) &&
      answersOf(sample, arms).some((got) => known(got.score) && got.score < 1),
  ],
  gained: [
    "untouched wrong, some method right",
    (sample, arms) =>
      whole(sample) && !rightOf(whole(sample)) && answersOf(sample, arms).some(rightOf),
  ],
  unparsed: [
    "some answer unparsed",
    (sample, arms) => answersOf(sample, arms).some((got) => !got.error && got.answer === undefined),
  ],
  errors: ["some error", (sample, arms) => answersOf(sample, arms).some((got) => got.error)],
};
const rightOf = (got) => Boolean(got) && known(got.score) && got.score >= 0.999;
const answersOf = (sample, arms) => arms.map((arm) => sample.got[arm]).filter(Boolean);
function whole(sample) {
  const key = Object.keys(sample.got).find(
    (arm) => DATA.arms[arm].untouched && DATA.arms[arm].model === state.model,
  );
  return key === undefined ? null : sample.got[key];
}

const seen = { filter: "all", kind: "", task: "", text: "", sample: null, methods: null };

function samplesSection() {
  const list = h("ul", {
    class: "list card",
    role: "listbox",
    tabindex: 0,
    id: "sample-list",
    "aria-label": "Samples",
  });
  const detail = h("div", { class: "detail card", id: "sample-detail", "aria-live": "polite" });
  const summary = h("p", { class: "soft small", id: "sample-count" });
  const parts = { list, detail, summary };
  const tools = sampleTools(() => update(parts));
  list.addEventListener("keydown", (event) => step(event, parts));
  onChange(() => {
    seen.methods = null;
    tools.refresh();
    update(parts);
  });
  const left = h(
    "p",
    { class: "soft small" },
    [...DATA.chosen.map((group) => leftOut(group)), seedsText()].join(" "),
  );
  const section = h(
    "section",
    { id: "samples", "aria-labelledby": "samples-title" },
    h(
      "div",
      { class: "title" },
      h("h2", { id: "samples-title" }, "Look at single samples"),
      summary,
    ),
    left,
    tools.node,
    h("div", { class: "browser" }, list, detail),
  );
  section.hidden = !DATA.samples.length;
  return {
    section,
    draw: () => {
      tools.refresh();
      update(parts);
    },
  };
}

const seedsText = () =>
  DATA.tables.some((table) => table.rows.some((row) => row.seeds.length > 1))
    ? "Of several seeds the first is shown."
    : "";

function leftOut(group) {
  if (group.shown >= group.of) return `${group.task}: all ${count(group.of)} samples.`;
  const how = [
    group.failed ? `${group.failed} with an error or an unparsed answer` : "",
    group.disagree ? `${group.disagree} where methods disagree` : "",
    "the rest at random",
  ]
    .filter(Boolean)
    .join(", ");
  return `${group.task}: ${count(group.shown)} of ${count(group.of)} samples are in this page, ${count(group.of - group.shown)} are left out (${how}).`;
}

function matches(sample) {
  const arms = [...seen.methods];
  if (seen.task && String(sample.task) !== seen.task) return false;
  if (seen.kind && sample.kind !== seen.kind) return false;
  if (!answersOf(sample, arms).length) return false;
  if (!FILTERS[seen.filter][1](sample, arms)) return false;
  if (!seen.text) return true;
  const said = answersOf(sample, arms).flatMap((got) => [got.answer, got.text, got.error]);
  return [sample.id, sample.question, ...sample.answers, ...said].some(
    (text) => text && String(text).toLowerCase().includes(seen.text),
  );
}

function update(parts) {
  const found = DATA.samples.filter(matches);
  parts.found = found;
  parts.summary.textContent = `${plural(found.length, "sample")} of ${count(DATA.samples.length)} in this page`;
  if (!found.includes(seen.sample)) seen.sample = found[0] || null;
  parts.list.replaceChildren(...found.map((sample, i) => listItem(sample, i, parts)));
  mark(parts);
  parts.detail.replaceChildren(
    ...(seen.sample
      ? sampleDetail(seen.sample, parts)
      : [h("p", { class: "faint" }, "No sample fits. Widen the filter or clear the search.")]),
  );
}

function listItem(sample, i, parts) {
  const uri = DATA.pictures[sample.picture];
  const dots = [...seen.methods]
    .filter((arm) => sample.got[arm])
    .map((arm) => {
      const got = sample.got[arm];
      return h("i", {
        class: !known(got.score)
          ? "none"
          : got.score >= 0.999
            ? ""
            : got.score > 0
              ? "half"
              : "wrong",
      });
    });
  return h(
    "li",
    {
      role: "option",
      id: `sample-${i}`,
      onclick: () => {
        seen.sample = sample;
        select(parts);
        reveal(parts);
      },
    },
    uri ? h("img", { src: uri, alt: "", loading: "lazy" }) : h("span", { class: "noimg" }),
    h(
      "div",
      {},
      h("div", { class: "q" }, sample.question || sample.id),
      h("div", { class: "dots", "aria-hidden": "true" }, dots),
    ),
  );
}

// Where list and detail lie below each other, a choice leads to what was chosen.
function reveal(parts) {
  if (parts.detail.getBoundingClientRect().top > parts.list.getBoundingClientRect().bottom)
    parts.detail.scrollIntoView({ block: "start" });
}

function mark(parts) {
  [...parts.list.children].forEach((item, i) =>
    item.setAttribute("aria-selected", String(parts.found[i] === seen.sample)),
  );
  const active = parts.list.querySelector('[aria-selected="true"]');
  if (active) parts.list.setAttribute("aria-activedescendant", active.id);
  else parts.list.removeAttribute("aria-activedescendant");
}

function select(parts) {
  mark(parts);
  parts.detail.replaceChildren(...sampleDetail(seen.sample, parts));
}

function step(event, parts) {
  const place = parts.found.indexOf(seen.sample),
    last = parts.found.length - 1;
  const next = {
    ArrowDown: place + 1,
    ArrowUp: place - 1,
    Home: 0,
    End: last,
    PageDown: place + 8,
    PageUp: place - 8,
  }[event.key];
  if (next === undefined || last < 0) return;
  event.preventDefault();
  go(Math.max(0, Math.min(last, next)), parts);
}

function go(place, parts) {
  seen.sample = parts.found[place];
  select(parts);
  const item = parts.list.children[place];
  parts.list.scrollTop = Math.min(
    item.offsetTop - 8,
    Math.max(
      parts.list.scrollTop,
      item.offsetTop + item.offsetHeight - parts.list.clientHeight + 8,
    ),
  );
}
