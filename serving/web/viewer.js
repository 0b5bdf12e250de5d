// The image with a layer over it, and what is at the place that is pointed at.

import { heat, inks, labels, middle, paint, shownSize } from "./pixels.js";

const $ = id => document.getElementById(id);
const stage = $("stage"), picture = $("picture"), cover = $("cover"), cross = $("cross"), tip = $("tip");

// {answer, size, label, hidden: Set of class ids, confidence: bytes or null, layer: "classes" or "confidence"}
let shown = null;
let place = null;  // {x, y} in shown pixels
let whenPointed = () => {};
const GAP = 12;  // between a place and its words

export const onPointed = action => { whenPointed = action; };

// The image as the browser reads it, or null for a format that it does not know (TIFF in most): then only colours show.
export const read = file => createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);

export function show(answer, bitmap) {
  const { width, height } = answer, size = shownSize(width, height);
  for (const canvas of [picture, cover]) Object.assign(canvas, size);  // also clears them
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.maxWidth = `min(100%, ${(72 * width / height).toFixed(2)}vh, ${Math.max(480, 2 * width)}px)`;
  const context = picture.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (bitmap?.width === width && bitmap.height === height) context.drawImage(bitmap, 0, 0, size.width, size.height);
  point(null);
  shown = { answer, size, label: labels(answer, size), hidden: new Set(), confidence: null, layer: "classes" };
  const seen = answer.classes.filter(one => one.pixels).sort((a, b) => b.pixels - a.pixels);
  const parts = seen.slice(0, 5).map(one => `${one.name} ${percent(one.share)}`);
  stage.setAttribute("aria-label", `The image with its classes: ${parts.join(", ") || "none"}`);
  draw();
}

export const now = () => shown;
export const percent = part => `${Math.round(100 * part)} %`;

export function draw() {
  const { answer, size, label, hidden, confidence, layer } = shown;
  const bytes = layer === "confidence" ? confidence : null;
  cover.getContext("2d").putImageData(paint(label, size, inks(answer.classes, hidden), bytes), 0, 0);
}

// The confidence answer (grey PNG) as bytes at the size shown; exact, since nothing is managed or premultiplied.
export async function grey(blob, { width, height }) {
  const exact = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(blob, exact);
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8Array.from({ length: width * height }, (_, i) => data[4 * i]);
}

// Read out what is at `to` ({x, y} in shown pixels, or null for nowhere); in words for a screen reader if `aloud`.
export function point(to, aloud = false) {
  place = to;
  cross.hidden = !(to && aloud);
  tip.hidden = !to;
  if (!to) return;
  const { answer, size, label, confidence } = shown, { x, y } = to, i = y * size.width + x;
  const one = answer.classes.find(({ id }) => id === label[i]);
  const sure = confidence ? `${percent(confidence[i] / 255)} sure` : "";
  const [column, row] = [middle(x, size.width, answer.width), middle(y, size.height, answer.height)];
  const words = [one?.name ?? "no class", sure, `${column}, ${row}`].filter(Boolean);
  const swatch = Object.assign(document.createElement("i"), { className: "swatch" });
  swatch.style.background = one ? `rgb(${one.color})` : "transparent";
  tip.replaceChildren(swatch, words.join(" · "));
  const [left, top] = [(x + .5) / size.width * stage.clientWidth, (y + .5) / size.height * stage.clientHeight];
  Object.assign(cross.style, { left: `${left}px`, top: `${top}px` });
  const room = stage.clientWidth - tip.offsetWidth, above = top - GAP - tip.offsetHeight;
  const beside = left + GAP <= room ? left + GAP : Math.max(0, Math.min(room, left - GAP - tip.offsetWidth));
  Object.assign(tip.style, { left: `${beside}px`, top: `${above < 0 ? top + GAP : above}px` });
  if (aloud) $("spoken").textContent = words.join(", ");
}

const inside = (value, n) => Math.min(n - 1, Math.max(0, value));

for (const kind of ["pointermove", "pointerdown"]) stage.addEventListener(kind, event => {
  if (!shown) return;
  const box = cover.getBoundingClientRect(), { width, height } = shown.size;
  const [x, y] = [(event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height];
  point({ x: inside(Math.floor(x), width), y: inside(Math.floor(y), height) });
  whenPointed();
});
stage.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") point(null); });
stage.addEventListener("blur", () => point(null));
stage.addEventListener("keydown", event => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Escape") point(null);
  if (!move || !shown || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const { width, height } = shown.size, step = event.shiftKey ? 1 : Math.ceil(Math.max(width, height) / 40);
  const from = place ?? { x: Math.floor(width / 2), y: Math.floor(height / 2) };
  point({ x: inside(from.x + move[0] * step, width), y: inside(from.y + move[1] * step, height) }, true);
  whenPointed();
});

// Called when the confidence has come: what is pointed at gets it too.
export const refresh = () => { if (place) point(place, !cross.hidden); };

$("opacity").addEventListener("input", dim);
export function dim() {
  cover.style.opacity = $("opacity").value / 100;
  $("percent").textContent = `${$("opacity").value} %`;
}

const ramp = $("ramp").getContext("2d"), bar = new ImageData(256, 1);
new Uint32Array(bar.data.buffer).set(heat);
ramp.putImageData(bar, 0, 0);
dim();
