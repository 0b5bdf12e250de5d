// The model card: what is served, how good it was on its test images, and where it comes from.

export const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

export function swatch(color) {
  const made = make("i", { className: "swatch" });
  made.style.background = `rgb(${color})`;
  return made;
}

const number = value => typeof value === "number" ? value.toFixed(1) : "–";
const range = pair => Array.isArray(pair) ? `${number(pair[0])} to ${number(pair[1])}` : "";

// Short, with the whole in the title; "unknown" and the like stay as they are.
const digits = text => make("code", { title: text, textContent: /^[0-9a-f]{20,}$/.test(text) ? text.slice(0, 12) : text });

function facts(model) {
  const { metrics, provider, precision, input } = model, list = make("dl");
  const rows = [
    ["Bundle", digits(model.bundle)],
    ["Method", model.method],
    ["mIoU on its test images", `${number(metrics.miou)} %`, metrics.miou_ci && `95 % interval ${range(metrics.miou_ci)}`],
    ["Runs on", `${provider}, ${precision}`],
    ["Works at", `${input.long_side} pixels, longer side`],
    ["Made", model.created.slice(0, 10)],
    ["Data", digits(model.data_hash)],
    ["Split", digits(model.split_hash)],
    ["Code", digits(model.commit)],
  ];
  for (const [term, ...details] of rows) {
    const said = details.filter(Boolean).flatMap((one, i) => i ? [make("br"), make("small", {}, one)] : [one]);
    list.append(make("div", {}, make("dt", {}, term), make("dd", {}, ...said)));
  }
  return list;
}

// IoU as a bar from 0 to 100, its interval as a thin line over the end.
function bar(iou, pair) {
  const made = make("span", { className: "bar" }), fill = make("i");
  fill.style.width = `${iou ?? 0}%`;
  made.append(fill);
  made.setAttribute("aria-hidden", "true");
  if (Array.isArray(pair)) {
    const whisker = make("b");
    Object.assign(whisker.style, { left: `${pair[0]}%`, width: `${pair[1] - pair[0]}%` });
    made.append(whisker);
  }
  return made;
}

// `per_class` holds numbers, with their intervals in `per_class_ci`; a class without test pixels has null.
function classes({ classes, metrics }) {
  const heads = ["Class", "IoU", "95 % interval", ""].map((text, i) => make(
    i < 3 ? "th" : "td", { className: i ? "number" : "", ...i < 3 && { scope: "col" } }, text));
  const table = make("table", {}, make("caption", { className: "unseen" }, "Intersection over union of each class"),
    make("thead", {}, make("tr", {}, ...heads)));
  const body = table.createTBody();
  for (const { name, color } of classes) {
    const iou = metrics.per_class?.[name], pair = metrics.per_class_ci?.[name];
    body.append(make("tr", {},
      make("th", { scope: "row" }, swatch(color), name),
      make("td", { className: "number" }, number(iou)),
      make("td", { className: "number quiet" }, range(pair) || "–"),
      make("td", { className: "grow" }, bar(iou, pair))));
  }
  return table;
}

export function showCard(model) {
  document.getElementById("facts").replaceChildren(facts(model), classes(model));
  document.getElementById("card").hidden = false;
  const chip = document.getElementById("serving");
  chip.replaceChildren(`${model.classes.length} classes · ${model.method} · bundle `, digits(model.bundle));
  chip.hidden = false;
}
