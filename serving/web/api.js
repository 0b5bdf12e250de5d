// What is asked of the service, and the same for a shell. Addresses are relative: a proxy may put the page below a path.

let token = "";  // in memory only
export const useToken = given => { token = given; };

// What can be had for an image: view -> its name, media type and file ending.
export const KINDS = {
  mask: { name: "Mask PNG", type: "image/png", ending: ".mask.png" },
  overlay: { name: "Overlay PNG", type: "image/png", ending: ".overlay.png" },
  geojson: { name: "GeoJSON", type: "application/geo+json", ending: ".geojson" },
  json: { name: "JSON (COCO)", type: "application/json", ending: ".json" },
  confidence: { name: "Confidence PNG", type: "image/png", ending: ".confidence.png" },
};

export class Problem extends Error {
  constructor(status, { code, message, request_id }) {
    super(message);
    Object.assign(this, { status, code, request: request_id });
  }
}

// The response to a request that went well. Throws Problem, or AbortError when `signal` says so.
async function ask(path, options = {}) {
  const headers = { ...options.headers, ...token && { Authorization: `Bearer ${token}` } };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { code: "unreachable", message: `The service cannot be reached: ${error.message}` });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const unknown = { code: "no-answer", message: `Something before the service answered with status ${response.status}.` };
  throw new Problem(response.status, body?.error ?? unknown);
}

export const model = async () => (await ask("v1/model")).json();

// What this service offers of POST /v1/segment: {views, query}, two sets of names.
export async function offers() {
  const operation = (await (await ask("v1/openapi.json")).json()).paths["/v1/segment"].post;
  const query = new Map(operation.parameters.filter(one => one.in === "query").map(one => [one.name, one.schema]));
  const view = query.get("view") ?? {};
  const views = [view, ...view.anyOf ?? []].flatMap(schema => schema.enum ?? []);
  return { views: new Set(views), query: new Set(query.keys()) };
}

const bodyType = file => file.type.startsWith("image/") ? file.type : "application/octet-stream";
const segmentPath = (view, query) => `v1/segment?${new URLSearchParams({ view, ...query })}`;

export function segment(file, view, { query = {}, signal } = {}) {
  const headers = { "Content-Type": bodyType(file), Accept: KINDS[view].type };
  return ask(segmentPath(view, query), { method: "POST", body: file, headers, signal });
}

export const fileName = (file, view) => (file.name || "image").replace(/\.[^.]*$/, "") + KINDS[view].ending;

const quoted = text => `'${text.replaceAll("'", "'\\''")}'`;
const local = name => name.startsWith("-") ? `./${name}` : name;

// The command that gets the same answer in a shell. The token stays out of it: a variable stands for it.
export function curl(file, view) {
  const lines = [
    `curl ${quoted(new URL(segmentPath(view, {}), document.baseURI).href)}`,
    `--data-binary ${quoted("@" + local(file.name || "image"))}`,
    `-H ${quoted("Content-Type: " + bodyType(file))} -H ${quoted("Accept: " + KINDS[view].type)}`,
    ...token ? ['-H "Authorization: Bearer $MARGINALIA_TOKEN"'] : [],
    `-o ${quoted(local(fileName(file, view)))}`,
  ];
  return lines.join(" \\\n  ");
}
