// SPDX-License-Identifier: Apache-2.0
// What hover and focus show, and what they light up elsewhere.

// Hover or focus in one place lights the same arm everywhere.
function light(arm) {
  const method = arm === null ? null : DATA.arms[arm].method;
  document
    .querySelectorAll("[data-method]")
    .forEach((node) =>
      node.classList.toggle(
        "dim",
        method !== null &&
          node.dataset.method !== method &&
          !DATA.arms[+node.dataset.arm]?.untouched,
      ),
    );
  document
    .querySelectorAll("[data-arm]")
    .forEach((node) => node.classList.toggle("lit", arm !== null && +node.dataset.arm === arm));
}

let anchored = null;

function showTip(anchor, content) {
  const tip = document.getElementById("tip");
  anchored = anchor;
  tip.replaceChildren(content);
  tip.hidden = false;
  placeTip();
}

function placeTip() {
  if (!anchored) return;
  const tip = document.getElementById("tip"),
    box = anchored.getBoundingClientRect();
  if (!anchored.isConnected || box.bottom < 0 || box.top > innerHeight) {
    hideTip();
    return;
  }
  const mine = tip.getBoundingClientRect(),
    edge = 8;
  const right = box.right + 10,
    left = right + mine.width > innerWidth - edge ? box.left - mine.width - 10 : right;
  tip.style.left = `${Math.max(edge, Math.min(left, innerWidth - mine.width - edge))}px`;
  const narrow = left < edge;
  const top = narrow ? box.bottom + 8 : box.top + box.height / 2 - mine.height / 2;
  tip.style.top = `${Math.max(edge, Math.min(top, innerHeight - mine.height - edge))}px`;
}

function hideTip() {
  anchored = null;
  document.getElementById("tip").hidden = true;
}
