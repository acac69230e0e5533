// The frame: addresses, views, dialogs, keys, and images that are dropped or pasted anywhere.

import { Refused, get, upload } from "/static/api.js";
import { element, moveAmongCards, named, notice, number, percent, telling, thumbnail } from "/static/dom.js";
import * as duplicates from "/static/duplicates.js";
import * as overview from "/static/overview.js";
import * as review from "/static/review.js";
import * as search from "/static/search.js";

const views = { search, review, duplicates, overview };
const main = document.getElementById("main");
const details = document.getElementById("details");
const help = document.getElementById("help");
let current = search;
let running = null;

// An address is the view and its parameters; a parameter may come several times.
export function addressOf(view, pairs = []) {
  return `/?${new URLSearchParams([["view", view], ...pairs.filter(([, value]) => value !== "" && value != null)])}`;
}

export function go(address) {
  if (address === location.pathname + location.search) { show(); return; }
  history.pushState(null, "", address);
  scrollTo(0, 0);
  show();
}

async function show() {
  const parameters = new URLSearchParams(location.search);
  const name = parameters.get("view") in views ? parameters.get("view") : "search";
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  current = views[name];
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name} · cvt-pipeline`;
  main.setAttribute("aria-busy", "true");
  try {
    await current.show(main, parameters, { go, addressOf, signal });
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    main.className = "wide";
    main.replaceChildren(element("h1", {}, "This cannot be shown"), element("p", { class: "problem" }, error.message),
      element("p", {}, element("a", { href: addressOf(name) }, "Begin anew")));
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='/?'], a[href='/']");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  details.close();
  go(link.getAttribute("href"));
});
addEventListener("popstate", () => {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  show();
});

document.addEventListener("details", ({ detail: image }) => {
  const facts = [["id", image.image_id], ["label", named(image.label) ? `${image.label} ${percent(image.label_score)}` : ""],
    ["decided", image.decision ? [image.decision.action, image.decision.label, image.decision.reviewer].filter(Boolean).join(" · ") : ""],
    ["size", image.width ? `${image.width} × ${image.height} ${image.format ?? ""}` : ""],
    ["shard", image.shard], ["key", image.key],
    ...Object.entries(image.metadata).map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : value]),
    ["sha256", image.sha256]].filter(([, value]) => value !== null && value !== undefined && value !== "");
  details.replaceChildren(
    element("div", { class: "look" }, thumbnail(image, 1024),
      element("div", {},
        element("dl", {}, facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))])),
        element("div", { class: "row" },
          element("a", { class: "button", href: addressOf("search", [["id", image.image_id]]) }, "Find images like it"),
          element("button", { type: "button", onclick: async () => {
            await navigator.clipboard?.writeText(image.image_id);
            notice("The id is in the clipboard.");
          } }, "Copy id"),
          element("button", { type: "button", class: "primary", onclick: () => details.close() }, "Close")))));
  details.showModal();
});

const KEYS = [["arrows", "go from image to image"], ["Enter", "find images like it"], ["i", "all that is known of it"],
  ["/", "the filter"], ["s r d o", "search, review, duplicates, overview"], ["a", "review: accept the label"],
  ["x", "review: reject it"], ["c", "review: change it"], ["u", "review: undo"], ["space", "review: choose several"],
  ["?", "this list"], ["Esc", "close"]];
document.getElementById("help-button").addEventListener("click", () => {
  help.replaceChildren(element("h1", {}, "Keyboard"),
    element("dl", {}, KEYS.flatMap(([key, what]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)])),
    element("p", { class: "dim" }, "Images can be dropped or pasted anywhere on the page."),
    element("button", { type: "button", class: "primary", onclick: () => help.close() }, "Close"));
  help.showModal();
});

document.addEventListener("keydown", (event) => {
  if (event.metaKey || event.ctrlKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input[type='text'], input[type='search'], select, textarea")) return;
  if (moveAmongCards(event) || current.key?.(event)) return;
  const view = { s: "search", r: "review", d: "duplicates", o: "overview" }[event.key];
  const focused = document.activeElement.closest?.("li")?.image;
  if (view) go(addressOf(view));
  else if (event.key === "?") document.getElementById("help-button").click();
  else if (event.key === "/" && document.getElementById("where")) document.getElementById("where").focus();
  else if (event.key === "i" && focused) document.dispatchEvent(new CustomEvent("details", { detail: focused }));
  else return;
  event.preventDefault();
});

export const searchByFile = (file) => telling(async () => {
  notice(`Looking at ${file.name || "the image"} …`);
  const { max_upload_bytes: most } = await overview.facts();
  if (file.size > most) throw new Refused(`${file.name} has ${number(file.size)} bytes; ${number(most)} are allowed`);
  const answer = await upload(file);
  notice("");
  go(addressOf("search", [["upload", answer.upload]]));
});

const drop = document.getElementById("drop");
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => { if (hasFiles(event)) { event.preventDefault(); drop.hidden = false; } });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.hidden = true; });
addEventListener("drop", (event) => {
  drop.hidden = true;
  const [file] = event.dataTransfer?.files ?? [];
  if (!file) return;
  event.preventDefault();
  searchByFile(file);
});
addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (!file) return;
  event.preventDefault();
  searchByFile(file);
});

export { get };
show();
