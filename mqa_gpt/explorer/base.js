"use strict";
// Draws the page from the data of `mqa_gpt.explorer.data`. One state, the current token and the
// chosen head; `show` brings every panel up to it. Texts of tokens enter the page as textContent
// only.

const data = JSON.parse(document.getElementById("data").textContent);
const { model, next, lens, prompt_tokens: N } = data;
const { n_layer: L, n_head: H } = model;
const T = data.ids.length;
const M = T - N; // new tokens
const PAIRS = (T * (T + 1)) / 2; // of a query and a key it sees
const weights = Uint8Array.from(atob(data.attention), (letter) => letter.charCodeAt(0));
// `token` is the one chosen by keyboard or click, `hovered` the one under the pointer, or null.
const state = { token: Math.max(0, N - 1), hovered: null, ...data.selected, playing: null };
const current = () => state.hovered ?? state.token;

// ------------------------------------------------------------------------------------- text

const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-US");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A token's text with everything invisible spelled out, so that none of it acts. */
function visible(text) {
  const named = text.replace(/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu, (letter) => {
    if (letter === "\n") return "↵";
    if (letter === "\t") return "⇥";
    return `⟨U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
  return named.replace(/^\p{M}/u, "◌$&");
}

const textOf = (id) => data.texts[id];
/** For lists and labels, where spaces must be seen. */
const label = (id) => visible(textOf(id)).replaceAll(" ", "·");
/** For running text, where lines break. */
const flowing = (id) => visible(textOf(id)).replaceAll("↵", "↵\n").replaceAll("⇥", "⇥\t");
/** For screen readers. */
const spoken = (id) =>
  visible(textOf(id))
    .replace(/ {2,}/g, (spaces) => ` ${spaces.length} spaces `)
    .replace(/^ $/, "space")
    .replaceAll("↵", " line break ")
    .replaceAll("⇥", " tab ");

const percent = (share) =>
  share > 0 && share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const bits = (i) => -data.logprobs[i] / Math.LN2;
const duration = (seconds) =>
  seconds >= 1
    ? `${seconds.toPrecision(3)} s`
    : seconds >= 0.1
      ? `${Math.round(1000 * seconds)} ms`
      : `${(1000 * seconds).toPrecision(3)} ms`;
const plural = (count, word) => `${number.format(count)} ${word}${count === 1 ? "" : "s"}`;

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  for (; bytes >= 1000 && unit < 3; unit++) bytes /= 1000;
  return unit ? `${bytes.toPrecision(3)} ${units[unit]}` : `${bytes} bytes`;
}

// ----------------------------------------------------------------------------------- colour

// The square root shows small shares of attention: they are many.
const SCALES = {
  probability: { of: (share) => share, ticks: ["0 %", "50 %", "100 %"] },
  loss: { of: (loss) => Math.min(loss / 12, 1), ticks: ["0 bits", "6", "12 and more"] },
  attention: { of: Math.sqrt, ticks: ["0 %", "25 %", "100 %"] },
};
let palette;

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const rgb = (name) => {
    const hex = style.getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };
  palette = Object.fromEntries(["panel", ...Object.keys(SCALES)].map((name) => [name, rgb(name)]));
}

/** The colour [r, g, b] of a value on a scale, from the panel's own to the scale's end. */
function mix(scale, value) {
  const share = SCALES[scale].of(value);
  return palette.panel.map((from, i) => Math.round(from + share * (palette[scale][i] - from)));
}

/** Black or white, whichever has more contrast: at least 4.58 to 1 (WCAG's relative luminance). */
function inkOn(rgb) {
  const [r, g, b] = rgb.map((x) => (x <= 10 ? x / 3294.6 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function paint(cell, scale, value) {
  const rgb = mix(scale, value);
  cell.style.background = `rgb(${rgb})`;
  cell.style.color = inkOn(rgb);
}

function drawLegend(id, scale) {
  const steps = Array.from({ length: 21 }, (_, i) => {
    const share = i / 20; // of the way along the scale; the inverse of `of`
    const value = scale === "loss" ? 12 * share : scale === "attention" ? share ** 2 : share;
    return `rgb(${mix(scale, value)})`;
  });
  const bar = element("div", { class: "scale" });
  bar.style.background = `linear-gradient(to right, ${steps})`;
  const ticks = SCALES[scale].ticks.map((text) => element("span", {}, text));
  byId(id).replaceChildren(bar, element("div", { class: "ticks" }, ...ticks));
}

// --------------------------------------------------------------------------------- keyboard

/** One tab stop for many items; `move(key, i)` says which comes next, if any. */
function rove(container, items, move, choose) {
  container.addEventListener("keydown", (event) => {
    const i = items.indexOf(event.target);
    const other =
      i < 0 || event.altKey || event.ctrlKey || event.metaKey ? null : move(event.key, i);
    if (other === null || !items[other]) return;
    event.preventDefault();
    choose(other);
    items[other].focus();
  });
}

const setStop = (items, i) => items.forEach((item, at) => (item.tabIndex = at === i ? 0 : -1));

function moveInGrid(columns, count) {
  const last = (i) => i - (i % columns) + columns - 1;
  return (key, i) => {
    if (key === "ArrowLeft") return i % columns ? i - 1 : null;
    if (key === "ArrowRight") return i < last(i) ? i + 1 : null;
    if (key === "ArrowUp") return i >= columns ? i - columns : null;
    if (key === "ArrowDown") return i + columns < count ? i + columns : null;
    if (key === "Home") return i - (i % columns);
    return key === "End" ? last(i) : null;
  };
}

/** In running text up and down go to the nearest token of the next line. */
function moveInText(items) {
  const at = (i) => items[i].getClientRects()[0] ?? items[i].getBoundingClientRect();
  const toLine = (i, step) => {
    const from = at(i);
    let best = null;
    for (let j = i + step; items[j]; j += step) {
      const box = at(j);
      if (Math.abs(box.top - from.top) < 4) continue;
      if (best !== null && Math.abs(box.top - at(best).top) >= 4) break;
      if (best === null || Math.abs(box.left - from.left) < Math.abs(at(best).left - from.left))
        best = j;
    }
    return best;
  };
  return (key, i) => {
    if (key === "ArrowLeft") return i - 1;
    if (key === "ArrowRight") return i + 1;
    if (key === "ArrowUp") return toLine(i, -1);
    if (key === "ArrowDown") return toLine(i, 1);
    if (key === "Home") return 0;
    return key === "End" ? items.length - 1 : null;
  };
}
