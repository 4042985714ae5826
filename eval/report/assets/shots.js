// SPDX-License-Identifier: Apache-2.0
// One sample: its answers side by side, each with what was left of the picture.

function sampleDetail(sample, parts) {
  const place = parts.found.indexOf(sample),
    group = DATA.chosen[sample.task];
  const move = (by, text) =>
    h(
      "button",
      {
        class: "btn",
        type: "button",
        disabled: !parts.found[place + by],
        "aria-label": `${text} sample`,
        onclick: () => {
          go(place + by, parts);
          document.querySelector(`[aria-label="${text} sample"]`)?.focus();
        },
      },
      by < 0 ? "←" : "→",
    );
  const fact = (name, value) =>
    value ? h("span", {}, h("span", { class: "faint" }, `${name} `), value) : null;
  const references = [...new Set(sample.answers)];
  return [
    h(
      "div",
      { class: "head" },
      h("h3", {}, sample.question || sample.id),
      h("span", { class: "group" }, move(-1, "previous"), move(1, "next")),
    ),
    h(
      "div",
      { class: "facts" },
      fact("reference", references.join(" | ")),
      fact("kind", sample.kind),
      fact("task", group.task),
      fact("id", sample.id),
      sample.choices.length
        ? fact(
            "choices",
            sample.choices.map((text, i) => `${optionName(sample, i)}. ${text}`).join("  "),
          )
        : null,
    ),
    h(
      "div",
      { class: "grid" },
      [...seen.methods]
        .filter((arm) => sample.got[arm])
        .map((arm, i) => shot(sample, arm, i === 0)),
    ),
    sample.prompt && sample.prompt !== sample.question
      ? h("details", { class: "small" }, h("summary", {}, "Prompt"), h("pre", {}, sample.prompt))
      : null,
  ].filter(Boolean);
}

// Classes are answered by number, options by letter.
const optionName = (sample, i) =>
  sample.answers.every((answer) => /^\d+$/.test(answer)) ? i : String.fromCharCode(65 + i);

function shot(sample, number, first) {
  const arm = DATA.arms[number],
    got = sample.got[number],
    uri = DATA.pictures[sample.picture];
  const seen =
    arm.method === BLIND
      ? "no picture"
      : !got.kept
        ? "the picture"
        : got.kept[0]
          ? "the picture, dropped patches veiled"
          : "the picture, what is not seen of it veiled";
  const alt = `${armName(arm)}: ${seen}`;
  const picture = uri
    ? h(
        "div",
        { class: "pic" },
        h("img", { src: uri, alt }),
        arm.method === BLIND ? h("div", { class: "blind" }) : got.kept ? veilOf(got.kept) : null,
      )
    : h(
        "div",
        { class: "pic" },
        h(
          "p",
          { class: "faint small", style: { padding: "10px", "line-height": "1.3" } },
          sample.picture ? "Picture left out to keep the page small." : "No picture was stored.",
        ),
      );
  const sign = got.error
    ? h("span", { class: "mark no" }, "!")
    : !known(got.score)
      ? null
      : got.score >= 0.999
        ? h("span", { class: "mark yes", title: "right" }, "✓")
        : got.score > 0
          ? h("span", { class: "mark", title: `score ${fixed(got.score, 2)}` }, fixed(got.score, 2))
          : h("span", { class: "mark no", title: "wrong" }, "✗");
  const said =
    got.error ||
    (got.answer === undefined ? "unparsed" : got.answer === "" ? "(empty)" : got.answer);
  return h(
    "div",
    { class: `shot${first && uri ? " first" : ""}`, "data-shot": number },
    picture,
    h(
      "div",
      { class: "cap" },
      h("span", { class: "arm soft" }, icon(arm), armName(arm)),
      got.kept ? h("div", { class: "faint small" }, keptCount(got.kept)) : null,
      h("div", { class: "said" }, sign, got.answer === undefined ? h("em", {}, said) : said),
      got.text !== undefined && !got.error ? h("div", { class: "raw" }, got.text) : null,
      got.beyond
        ? h("div", { class: "faint small" }, `${count(got.beyond)} tokens beyond its positions`)
        : null,
    ),
  );
}

function bitsOf([rows, columns, packed]) {
  let bytes = "";
  try {
    bytes = atob(packed);
  } catch {
    return null;
  }
  if (bytes.length * 8 < rows * columns) return null;
  return (i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1;
}

function keptCount(kept) {
  if (!kept[0]) return "patches within the frame";
  const bit = bitsOf(kept);
  if (!bit) return "";
  let total = 0;
  for (let i = 0; i < kept[0] * kept[1]; i += 1) total += bit(i);
  return `${total} of ${kept[0] * kept[1]} patches${kept[3] > 1 ? ", largest grid" : ""}`;
}

// Where the grid covers a part of the picture, or reaches beyond it (padding).
function placeGrid(canvas, [left, top, right, bottom]) {
  canvas.className = "cut"; // what lies around it was cut off before the model saw it
  const share = (x) => `${100 * x}%`;
  Object.assign(canvas.style, {
    inset: "auto",
    left: share(left),
    top: share(top),
    width: share(right - left),
    height: share(bottom - top),
  });
}

// One pixel per patch, stretched over the picture by the browser.
function veilOf(kept) {
  const bit = bitsOf(kept),
    [rows, columns] = kept;
  if (!bit) return null;
  if (!rows) {
    const frame = h("canvas", { width: 1, height: 1, "aria-hidden": "true" });
    placeGrid(frame, kept[4]);
    return frame;
  }
  const canvas = h("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const context = canvas.getContext("2d"),
    image = context.createImageData(columns, rows);
  const [r, g, b] = getComputedStyle(document.documentElement)
    .getPropertyValue("--veil")
    .trim()
    .split(/\s+/)
    .map(Number);
  for (let i = 0; i < rows * columns; i += 1)
    image.data.set(bit(i) ? [0, 0, 0, 0] : [r, g, b, 214], 4 * i);
  context.putImageData(image, 0, 0);
  if (kept[4]) placeGrid(canvas, kept[4]);
  return canvas;
}
