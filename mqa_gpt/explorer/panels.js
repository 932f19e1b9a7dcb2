// The panels. `show` brings all of them to the current token.

function choose(token) {
  state.token = token;
  state.hovered = null;
  show();
}

function hover(token) {
  if (state.playing !== null || state.hovered === token) return;
  state.hovered = token;
  show();
}

/** The tokens as running text, one option each. */
function textView(id) {
  const items = data.ids.map((tokenId, i) => {
    const item = element("span", { role: "option", class: data.parts[i] }, flowing(tokenId));
    item.addEventListener("pointerenter", () => hover(i));
    item.addEventListener("click", () => choose(i));
    return item;
  });
  byId(id).append(...items);
  byId(id).addEventListener("pointerleave", () => hover(null));
  rove(byId(id), items, moveInText(items), choose);
  return items;
}

/** The bytes of one head's attention of token i: to tokens 0 to i. */
function attentionOf(layer, head, i) {
  const start = (layer * H + head) * PAIRS + (i * (i + 1)) / 2;
  return weights.subarray(start, start + i + 1);
}

/** A head's whole pattern; in a small canvas each pixel has the largest of its weights. */
function drawPattern(canvas, layer, head, pixels) {
  const largest = new Uint8Array(pixels * pixels);
  for (let query = 0; query < T; query++) {
    const y = Math.floor((query * pixels) / T) * pixels;
    attentionOf(layer, head, query).forEach((weight, key) => {
      const at = y + Math.floor((key * pixels) / T);
      if (weight > largest[at]) largest[at] = weight;
    });
  }
  const colours = Uint32Array.from({ length: 256 }, (_, weight) => {
    const [r, g, b] = mix("attention", weight / 255);
    return r | (g << 8) | (b << 16) | (255 << 24);
  });
  canvas.width = canvas.height = pixels;
  const image = new ImageData(pixels, pixels);
  new Uint32Array(image.data.buffer).set(Uint32Array.from(largest, (weight) => colours[weight]));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function bar(id, share, chosen) {
  const filled = element("span", { class: "bar", "aria-hidden": "true" });
  filled.style.width = `${100 * share}%`;
  const token = element("span", { class: "token" }, label(id));
  const row = element(
    "li",
    {},
    token,
    filled,
    element("span", { class: "number" }, percent(share)),
  );
  if (chosen) row.className = "chosen";
  return row;
}

const headName = (layer, head) => `layer ${layer}, head ${head}`;

const heads = []; // the cells of the table of heads, layer by layer

function buildHeads() {
  const table = element("table", { role: "grid", "aria-label": "Heads" });
  const numbers = Array.from({ length: H }, (_, h) => element("th", { scope: "col" }, `${h}`));
  const corner = element("th", { scope: "col" }, "layer \\ head");
  const body = element("tbody");
  for (let l = 0; l < L; l++) {
    const row = element("tr", {}, element("th", { scope: "row" }, `${l}`));
    for (let h = 0; h < H; h++) {
      const name = { role: "gridcell", "aria-label": headName(l, h), title: headName(l, h) };
      const cell = element("td", name, element("canvas", { "aria-hidden": "true" }));
      cell.addEventListener("click", () => chooseHead(l * H + h));
      heads.push(cell);
      row.append(cell);
    }
    body.append(row);
  }
  table.append(element("thead", {}, element("tr", {}, corner, ...numbers)), body);
  table.style.setProperty("--heads", H);
  byId("heads").append(table);
  rove(table, heads, moveInGrid(H, L * H), chooseHead);
}

function chooseHead(i) {
  [state.layer, state.head] = [Math.floor(i / H), i % H];
  showHead();
  show();
}

function showHead() {
  const i = state.layer * H + state.head;
  setStop(heads, i);
  heads.forEach((cell, at) => cell.setAttribute("aria-selected", at === i));
  byId("map-title").textContent = `All of ${headName(state.layer, state.head)}`;
  drawPattern(byId("map"), state.layer, state.head, T);
}

const cells = []; // of the lens, from the last layer down to the embedding

function buildLens() {
  const body = element("tbody");
  for (let row = L; row >= 0; row--) {
    const name = row ? `layer ${row - 1}` : "embedding";
    const line = element("tr", {}, element("th", { scope: "row" }, name));
    for (let i = 0; i < T; i++) {
      const [id, share] = [lens.ids[row][i], lens.probabilities[row][i]];
      const says = `${name} after ${spoken(data.ids[i])}: ${spoken(id)}, ${percent(share)}`;
      const cell = element("td", { role: "gridcell", "aria-label": says, title: label(id) });
      cell.append(label(id), element("small", {}, percent(share)));
      cell.classList.toggle("settled", id === lens.ids[L][i]);
      cell.addEventListener("click", () => choose(i));
      cells.push(cell);
      line.append(cell);
    }
    body.append(line);
  }
  const read = data.ids.map((id) => element("th", { scope: "col" }, label(id)));
  const foot = element("tr", {}, element("th", { scope: "row" }, "after reading"), ...read);
  byId("lens").append(body, element("tfoot", {}, foot));
  rove(byId("lens"), cells, moveInGrid(T, cells.length), (i) => choose(i % T));
}

const SVG = "http://www.w3.org/2000/svg";

function drawStrip(way, rows, read) {
  const bytes = data.cache.bytes_per_token[way];
  const isOurs = rows === model.n_kv_head;
  const strip = element("div", { class: "strip" });
  const name = way === "mqa" ? "Multi-query attention" : "Multi-head attention";
  const title = element(
    "span",
    {},
    `${name}: ${plural(rows, "key/value head")}${isOurs ? " (this model)" : ""}`,
  );
  strip.append(element("p", {}, title, element("strong", {}, size(bytes * read))));
  const drawing = document.createElementNS(SVG, "svg");
  const shape = (kind, attributes) => {
    const made = document.createElementNS(SVG, kind);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    drawing.append(made);
  };
  const held = `${name}: ${number.format(read)} of ${T} tokens, ${number.format(bytes * read)} bytes`;
  for (const [key, value] of Object.entries({
    viewBox: `0 0 ${T} ${rows}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": held,
  }))
    drawing.setAttribute(key, value);
  drawing.style.height = `${rows * Math.min(22, Math.max(3, 160 / H))}px`;
  shape("rect", { class: "prefill", width: Math.min(read, N), height: rows });
  if (read > N) shape("rect", { class: "decode", x: N, width: read - N, height: rows });
  const lines = Array.from({ length: T - 1 }, (_, i) => `M${i + 1} 0V${rows}`);
  for (let row = 1; row < rows; row++) lines.push(`M0 ${row}H${T}`);
  shape("path", { d: lines.join("") });
  strip.append(drawing);
  return strip;
}

function showCache() {
  // Prefill reads the prompt at once; of the new tokens the last is never read.
  const read = Math.min(Math.max(current() + 1, N), T - 1 || 1);
  const { mqa, mha } = data.cache.bytes_per_token;
  byId("cache").replaceChildren(
    drawStrip("mqa", 1, read),
    ...(H > 1 ? [drawStrip("mha", H, read)] : []),
  );
  const full = number.format(model.n_positions);
  const when = read > N ? `After ${plural(read - N, "step")} of decoding` : "After the prefill";
  byId("cache-sum").textContent =
    `${when} the cache holds ${plural(read, "token")}, for each ${number.format(mqa)} bytes as MQA ` +
    `and ${number.format(mha)} as MHA (${L} layers, K and V of ${model.head_dim} numbers per head, ` +
    `${data.cache.dtype}). The whole context of ${full} tokens takes ` +
    `${size(mqa * model.n_positions)} or ${size(mha * model.n_positions)}, and each decode step reads ` +
    `all that is held.`;
}

function showNext(i) {
  const follows = data.ids[i + 1];
  byId("next-title").replaceChildren(
    "After ",
    element("span", { class: "token" }, label(data.ids[i])),
    " comes",
  );
  const rows = next.ids[i].map((id, k) => bar(id, next.probabilities[i][k], id === follows));
  if (i + 1 < T && !next.ids[i].includes(follows))
    rows.push(bar(follows, Math.exp(data.logprobs[i + 1]), true));
  byId("next-list").replaceChildren(...rows);
  const rank = data.ranks[i + 1];
  const choice =
    rank === 1 ? "the model’s first choice" : `its choice number ${number.format(rank)}`;
  byId("goes-on").textContent =
    i + 1 < T ? `The edge marks what the text goes on with: ${choice}.` : "The text ends here.";
}

function showAttention(i) {
  const share = attentionOf(state.layer, state.head, i);
  attentionItems.forEach((item, key) => {
    if (key <= i) paint(item, "attention", share[key] / 255);
    else item.removeAttribute("style");
    item.classList.toggle("later", key > i);
    const seen = key > i ? "not yet read" : percent(share[key] / 255);
    item.setAttribute("aria-label", `${spoken(data.ids[key])}, ${seen}`);
  });
  const where = element("span", { class: "token" }, label(data.ids[i]));
  byId("looking").replaceChildren(`Where ${headName(state.layer, state.head)} looks from `, where);
  const most = [...share.keys()].sort((a, b) => share[b] - share[a]).slice(0, 5);
  const rows = most
    .filter((key) => share[key])
    .map((key) => {
      const row = bar(data.ids[key], share[key] / 255, false);
      row.firstChild.textContent = `${key + 1}: ${label(data.ids[key])}`;
      return row;
    });
  byId("attention-list").replaceChildren(...rows);
  const row = byId("map-row").style; // beside what the row shows, not over it
  [row.top, row.left, row.height] = [i / T, (i + 1) / T, 1 / T].map((x) => `${100 * x}%`);
}

function mark(items, i) {
  items.forEach((item, at) => {
    item.classList.toggle("current", at === i);
    item.setAttribute("aria-selected", at === i);
  });
}

/** Scroll a box, not the page, so that an item in it can be seen. */
function reveal(box, item) {
  const [outer, inner] = [box.getBoundingClientRect(), item.getBoundingClientRect()];
  const [dx, dy] = [
    inner.left + inner.width / 2 - outer.left - outer.width / 2,
    inner.top - outer.top - outer.height / 2,
  ];
  if (inner.left < outer.left + 100 || inner.right > outer.right) box.scrollLeft += dx;
  if (inner.top < outer.top || inner.bottom > outer.bottom) box.scrollTop += dy;
}

/** Bring every panel to the current token. */
function show() {
  const i = current();
  mark(textItems, i);
  mark(attentionItems, i);
  setStop(textItems, state.token);
  setStop(attentionItems, state.token);
  const focused = cells.indexOf(document.activeElement);
  setStop(cells, focused >= 0 && focused % T === i ? focused : i);
  cells.forEach((cell, at) => {
    cell.classList.toggle("current", at % T === i);
    cell.setAttribute("aria-selected", at % T === i);
  });
  const heading = byId("lens").tFoot.rows[0].cells;
  [...heading].forEach((cell, at) => cell.classList.toggle("current", at === i + 1));
  const from =
    { new: "written by the model", control: "a control token" }[data.parts[i]] ??
    `of the ${data.parts[i]}`;
  const likely = i ? `, ${percent(Math.exp(data.logprobs[i]))} likely` : "";
  byId("slider").value = i;
  byId("slider").setAttribute(
    "aria-valuetext",
    `${i + 1} of ${T}: ${spoken(data.ids[i])}, ${from}`,
  );
  byId("current").replaceChildren(
    `Token ${i + 1} of ${T}: `,
    element("span", { class: "token" }, label(data.ids[i])),
    ` ${from}${likely}`,
  );
  showNext(i);
  showAttention(i);
  showCache();
  if (state.hovered === null) {
    reveal(byId("lens").parentElement, cells[i]);
    reveal(byId("text"), textItems[i]);
    reveal(byId("attention"), attentionItems[i]);
  }
}

// ------------------------------------------------------------------------- what never changes

function showTexts() {
  const facts = [
    `${model.name || "model"}: ${number.format(model.parameters)} parameters`,
    plural(L, "layer"),
    `${plural(H, "query head")} per layer on ${plural(model.n_kv_head, "key/value head")}`,
    `${model.dtype} on ${model.device}`,
  ];
  byId("facts").textContent = `${facts.join(" · ")}.`;
  document.title = `mqa-gpt explore: ${visible(model.name || "model")}`;
  byId("sharing").textContent =
    model.n_kv_head < H
      ? `The ${H} heads of a layer ask different questions of the same keys and values: that is multi-query attention.`
      : `Each of the ${H} heads of a layer has keys and values of its own: this is multi-head attention.`;
  byId("cache-intro").textContent =
    `In multi-query attention the ${H} heads of a layer share one pair per token, in multi-head ` +
    `attention each has its own. One layer, drawn to scale:`;
  if (model.tie_word_embeddings)
    byId("tied").textContent =
      "(The embedding mostly says the token itself, since one table serves to read and to write.)";
  const ends = { stop: "it ended by itself or at a stop text", length: "the limit" }[
    data.finish_reason
  ];
  const ways = { psm: "prefix, suffix, then the middle", spm: "suffix, prefix, then the middle" };
  const key = [
    element(
      "span",
      {},
      element("i", { class: "swatch new" }),
      ` written by the model: ${plural(M, "token")} (${ends ?? data.finish_reason})`,
    ),
  ];
  if (ways[data.mode]) key.push(element("span", {}, `infilling, in the order ${ways[data.mode]}`));
  if (data.parts.includes("control"))
    key.push(element("span", {}, element("em", {}, "italic"), ": control tokens"));
  byId("parts").replaceChildren(...key);
}

function showTime() {
  const { prefill, decode } = data.seconds;
  const on = model.threads ? `${model.device}, ${plural(model.threads, "thread")}` : model.device;
  byId("time-intro").textContent =
    `Measured while this text was written (${on}). Prefill reads all tokens of the prompt in one go, ` +
    `so each weight that is fetched serves them all; decoding fetches every weight again for each new token.`;
  const rows = [
    ["prefill", N, prefill, "--prefill"],
    ["decode", M - 1, decode, "--decode"],
  ].filter(([, count]) => count);
  const longest = Math.max(...rows.map(([, , seconds]) => seconds));
  const heading = ["", "tokens", "time", "per token", "tokens per second"].map((text) =>
    element("th", { scope: "col" }, text),
  );
  heading[0] = element("td");
  const body = rows.map(([name, count, seconds, colour]) => {
    const filled = element("div", { class: "bar" });
    filled.style.width = `${(100 * seconds) / longest}%`;
    filled.style.background = `var(${colour})`;
    const figures = [
      number.format(count),
      duration(seconds),
      duration(seconds / count),
      number.format(Math.round(count / seconds)),
    ];
    const columns = figures.map((text) => element("td", { class: "number" }, text));
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      ...columns,
      element("td", { class: "wide" }, filled),
    );
  });
  byId("time").append(
    element("thead", {}, element("tr", {}, ...heading, element("td"))),
    element("tbody", {}, ...body),
  );
  const times = decode / (M - 1) / (prefill / N);
  byId("time-sum").textContent =
    M > 1 ? `A new token took ${times.toPrecision(2)} times as long as a token of the prompt.` : "";
}

/** What depends on the theme or on the chosen quantity. */
function colour() {
  readPalette();
  const scale = document.querySelector("[name=colour]:checked").value;
  textItems.forEach((item, i) => {
    const values = i
      ? { probability: Math.exp(data.logprobs[i]), loss: bits(i) }
      : { probability: 0, loss: 0 };
    paint(item, scale, values[scale]);
    const says = i
      ? `${percent(values.probability)}, ${bits(i).toFixed(1)} bits`
      : "first token, not predicted";
    item.setAttribute("aria-label", `${spoken(data.ids[i])}, ${says}`);
    item.title = says;
  });
  cells.forEach((cell, at) =>
    paint(cell, "probability", lens.probabilities[L - Math.floor(at / T)][at % T]),
  );
  heads.forEach((cell, i) =>
    drawPattern(cell.firstChild, Math.floor(i / H), i % H, Math.min(T, 48)),
  );
  showHead();
  drawLegend("text-legend", scale);
  drawLegend("attention-legend", "attention");
  drawLegend("lens-legend", "probability");
  show();
}

function play() {
  const isOn = state.playing !== null;
  clearInterval(state.playing);
  state.playing = null;
  if (!isOn) {
    if (state.token >= T - 1 || state.token < N - 1) choose(Math.max(0, N - 1));
    state.playing = setInterval(
      () => (state.token < T - 1 ? choose(state.token + 1) : play()),
      700,
    );
  }
  byId("play").textContent = isOn ? "Play" : "Pause";
  byId("play").setAttribute("aria-pressed", !isOn);
  byId("current").ariaLive = isOn ? "off" : "polite"; // else what has the focus speaks for itself
}

const textItems = textView("text");
const attentionItems = textView("attention");
byId("slider").max = T - 1;
byId("slider").addEventListener("input", (event) => choose(Number(event.target.value)));
byId("play").addEventListener("click", play);
byId("colouring").addEventListener("change", colour);
byId("map").addEventListener("click", (event) =>
  choose(Math.min(T - 1, Math.floor((event.offsetY * T) / byId("map").clientHeight))),
);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colour);
buildHeads();
buildLens();
showTexts();
showTime();
colour();
