// The page: takes an image, asks the service, shows what it answers.

import { KINDS, Problem, curl, fileName, model, offers, segment, useToken } from "./api.js";
import { make, showCard, swatch } from "./card.js";
import * as viewer from "./viewer.js";

const $ = id => document.getElementById(id);
const percent = part => `${(100 * part).toFixed(1)} %`;

let current = null;  // {file, answer, files: Map of view and query -> Promise of Blob}
let offered = { views: new Set(["mask", "json", "overlay"]), query: new Set() };
let running = null;  // AbortController of the image on its way
let again = () => {};  // what "Try again" and a new token repeat

const say = text => { $("status").textContent = text; };

function complain(error) {
  if (!(error instanceof Problem)) error = new Problem(0, { code: "page", message: `This page failed: ${error.message}` });
  const about = [error.code, error.status && `status ${error.status}`, error.request && `request ${error.request}`];
  const said = [make("p", {}, error.message), make("code", {}, about.filter(Boolean).join(" · "))];
  if (!error.status || error.status >= 500)
    said.push(make("button", { type: "button", className: "plain", onclick: () => again() }, "Try again"));
  say("");
  $("problem").replaceChildren(...said);
  $("problem").hidden = false;
  if (error.status !== 401) return;
  $("secret").hidden = false;
  $("token").focus();
}

// Do `work`, and show the model card where that has not been possible yet. What goes wrong is told; `again` repeats it.
async function attempt(work) {
  again = () => attempt(work);
  $("problem").hidden = true;
  try {
    await work();
    if ($("card").hidden) showCard(await model());
    $("secret").hidden = true;
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
}

async function look(file) {
  running?.abort();
  const mine = running = new AbortController();
  say(`Segmenting ${file.name || "the image"} …`);
  document.body.classList.add("busy");
  try {
    const [bitmap, response] = await Promise.all([viewer.read(file), segment(file, "json", { signal: mine.signal })]);
    const answer = await response.json();
    current = { file, answer, files: new Map() };
    $("result").hidden = false;
    viewer.show(answer, bitmap);
    bitmap?.close();
    tell(response.headers, bitmap);
  } catch (error) {
    if (error.name !== "AbortError") $("result").hidden = true;  // what is there belongs to another image
    if (error instanceof Problem) error.message = `${file.name || "The image"}: ${error.message}`;
    throw error;
  } finally {
    if (running === mine) document.body.classList.remove("busy");
  }
}

function tell(headers, bitmap) {
  const { file, answer } = current, seen = answer.classes.filter(one => one.pixels).length;
  const spent = (headers.get("Server-Timing") ?? "").replaceAll(/;dur=([\d.]+)/g, (_, ms) => ` ${(+ms).toFixed(1)}`);
  say(`${file.name || "The image"}: ${seen} of ${answer.classes.length} classes seen.`);
  $("about").textContent = [
    `${answer.width} × ${answer.height} pixels`, `${percent(answer.confidence)} sure`, `bundle ${answer.bundle}`,
    spent && `${spent} ms`, `request ${headers.get("X-Request-Id")}`,
    !bitmap && "this browser does not draw the format, so only the classes are shown",
  ].filter(Boolean).join(" · ");
  document.querySelector("[name=layer][value=classes]").checked = true;
  $("scale").hidden = true;
  legend();
  command();
}

function legend() {
  const rows = current.answer.classes.toSorted((a, b) => b.pixels - a.pixels || a.id - b.id);
  $("legend").replaceChildren(...rows.map(one => {
    const box = make("input", { type: "checkbox", checked: true, value: one.id, disabled: !one.pixels });
    box.onchange = () => toggle(one.id, box.checked);
    const area = make("td", { className: "number", title: `${one.pixels} pixels` }, percent(one.share));
    const sure = make("td", { className: "number" }, one.confidence === null ? "–" : viewer.percent(one.confidence));
    const name = make("th", { scope: "row" }, make("label", {}, box, swatch(one.color), make("span", {}, one.name)));
    return make("tr", { className: one.pixels ? "" : "absent" }, name, area, sure);
  }));
}

function toggle(id, on) {
  viewer.now().hidden[on ? "delete" : "add"](id);
  viewer.draw();
}

for (const [button, on] of [["all", true], ["none", false]]) $(button).onclick = () => {
  for (const box of $("legend").querySelectorAll("input:enabled")) {
    box.checked = on;
    viewer.now().hidden[on ? "delete" : "add"](+box.value);
  }
  viewer.draw();
};

// An answer in another form, asked for once per image. It must be of the bundle that answered first.
function fetched(view, query = {}) {
  const { file, answer, files } = current, key = `${view}?${new URLSearchParams(query)}`;
  const asked = files.get(key) ?? segment(file, view, { query }).then(async response => {
    const bundle = response.headers.get("X-Bundle-Id");
    if (bundle === answer.bundle) return response.blob();
    const message = `The model was changed to bundle ${bundle} since this result; choose the image again.`;
    throw new Problem(0, { code: "model-changed", message, request_id: response.headers.get("X-Request-Id") });
  });
  files.set(key, asked);
  asked.catch(() => files.delete(key));
  return asked;
}

// The confidence of every pixel, once per image, when somebody points at it or wants to see it.
async function shade() {
  const shown = viewer.now(), { answer, size } = shown;
  if (shown.confidence || !offered.views.has("confidence")) return;
  const scaled = size.width !== answer.width && offered.query.has("size");
  const blob = await fetched("confidence", scaled ? { size: `${size.width}x${size.height}` } : {});
  shown.confidence = await viewer.grey(blob, size);
  viewer.refresh();
}

// Pointing asks once: what failed would send the image again at every move. The class is read out all the same.
viewer.onPointed(() => {
  const shown = viewer.now();
  if (!shown.gaveUp) shade().catch(() => { shown.gaveUp = true; });
});

$("views").onchange = event => attempt(async () => {
  const layer = event.target.value;
  if (layer === "confidence") await shade();
  viewer.now().layer = layer;
  $("scale").hidden = layer !== "confidence";
  viewer.draw();
});

const kind = () => document.querySelector("[name=kind]:checked").value;
const command = () => { $("curl").textContent = curl(current.file, kind()); };

function kinds() {
  const views = Object.keys(KINDS).filter(view => offered.views.has(view));
  $("kinds").append(...views.map((view, i) => make("label", {},
    make("input", { type: "radio", name: "kind", value: view, checked: !i }), make("span", {}, KINDS[view].name))));
  $("views").hidden = !offered.views.has("confidence");
}
$("kinds").onchange = command;

$("download").onclick = () => attempt(async () => {
  const view = kind(), href = URL.createObjectURL(await fetched(view));
  make("a", { href, download: fileName(current.file, view) }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
  say(`${fileName(current.file, view)} is downloaded.`);
});

$("copy").onclick = async () => {
  getSelection().selectAllChildren($("curl"));  // also what is left where the clipboard is closed to the page
  const copied = await navigator.clipboard?.writeText($("curl").textContent).then(() => true, () => false);
  say(copied || document.execCommand("copy") ? "The command is copied." : "Press Ctrl+C to copy the command.");
};

function take(files) {
  if (!files?.length) return;
  attempt(() => look(files[0]));
  if (files.length > 1) say(`Segmenting ${files[0].name}, the first of ${files.length} …`);
}

$("drop").onclick = () => $("file").click();
$("file").onchange = () => { take($("file").files); $("file").value = ""; };  // so that the same file may be chosen again
addEventListener("paste", event => take(event.clipboardData.files));
for (const kind of ["dragover", "dragleave", "drop"]) addEventListener(kind, event => {
  event.preventDefault();
  document.body.classList.toggle("over", kind === "dragover");
  if (kind === "drop") take(event.dataTransfer.files);
});

$("secret").onsubmit = event => {
  event.preventDefault();
  useToken($("token").value);
  again();
};

attempt(() => {});
offers().then(found => { offered = found; }, () => {}).then(kinds);  // without a description: what every version offers
