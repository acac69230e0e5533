// What the server is asked, and how its refusals are told.

// `status` is the answer's; undefined where there was none.
export class Refused extends Error {
  constructor(message, status = undefined) {
    super(message);
    this.status = status;
  }
}

async function answerOf(response) {
  let body = null;
  try { body = await response.json(); } catch { /* not JSON: told by its status */ }
  if (response.ok) return body;
  const detail = Array.isArray(body?.detail) ? body.detail.map((it) => it.msg).join("; ") : body?.detail;
  throw new Refused(body?.error ?? detail ?? `the server answers ${response.status}`, response.status);
}

async function ask(path, options) {
  let response;
  try { response = await fetch(path, options); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server cannot be reached; nothing was lost, try again when it is back");
  }
  return answerOf(response);
}

// Refusals are answers with 2xx or 4xx; the page asks for the former alone where it can, so that the console
// stays empty: what is checked here first is what people may type.
export const get = (path, parameters = [], signal = undefined) =>
  ask(`${path}?${new URLSearchParams(parameters)}`, { signal });

export const post = (path, value) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });

export const upload = (file) =>
  ask("/api/uploads", { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file });
