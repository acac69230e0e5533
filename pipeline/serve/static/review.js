// Review: a label's images as a grid, the least sure first; a decision is kept before it is shown.

import { Refused, get, post } from "/static/api.js";
import { card, element, notice, number, percent } from "/static/dom.js";

const SHOWN = { open: "open", decided: "decided", all: "all" };
const done = []; // what was decided on this page, for undo: lists of undos
let grid = null;
let labels = [];
let reload = () => {};
let queue = Promise.resolve(); // keys are faster than storage: what they mean is done one after the other

export async function show(main, parameters, { addressOf, go, signal }) {
  [grid, last] = [null, null]; // a key means nothing until there are images to see
  const counts = await get("/api/labels", [], signal);
  labels = counts.labels.map((entry) => entry.label);
  const label = parameters.get("label") ?? labels[0];
  const shown = parameters.get("show") in SHOWN ? parameters.get("show") : "open";
  const address = (name, what) => addressOf("review", [["label", name], ["show", what === "open" ? "" : what]]);
  reload = () => go(address(label, shown));
  const list = element("ul", { class: "choices", tabindex: "0", "aria-label": "Labels" }, counts.labels.map((entry) =>
    element("li", {}, element("a", { href: address(entry.label, shown), "aria-current": entry.label === label && "true" },
      element("span", { class: "name", title: entry.label }, entry.label),
      element("span", { class: "count" }, `${number(entry.decided)} / ${number(entry.count)}`)))));
  const sidebar = element("aside", { "aria-label": "Labels" },
    element("details", { open: true }, element("summary", {}, "Labels (decided / all)"), list),
    element("label", { class: "field" }, "Your name", element("input", { type: "text", id: "reviewer", maxlength: "100",
      value: localStorage.getItem("reviewer") ?? "", autocomplete: "off",
      onchange: (event) => localStorage.setItem("reviewer", event.target.value) })));
  main.className = "";
  if (label === undefined) {
    main.replaceChildren(sidebar, element("p", {}, "There are no labels."));
    return;
  }
  const page = await get("/api/review", [["label", label], ["show", shown]], signal);
  grid = element("ul", { class: "grid", id: "review" });
  page.images.forEach(put);
  const views = element("div", { class: "row", role: "group", "aria-label": "Which images" }, Object.keys(SHOWN).map((what) =>
    element("a", { class: "button", href: address(label, what), "aria-current": what === shown && "true" }, what)));
  const tools = element("div", { class: "row", role: "toolbar", "aria-label": "Decide" },
    tool("Accept", "a", () => decide("accept")), tool("Reject", "x", () => decide("reject")),
    tool("Change …", "c", change), tool("Undo", "u", undo),
    element("button", { type: "button", onclick: acceptAll }, "Accept all shown"));
  const next = element("button", { type: "button", onclick: reload }, "Next images");
  main.replaceChildren(sidebar, element("section", { "aria-label": "Images" },
    element("h1", {}, `${label}: ${number(page.total)} ${shown === "all" ? "images" : shown}`), views,
    element("h2", {}, "Decide"), tools, element("p", { class: "dim" }, "On the image with the focus, or on those chosen with the space bar."),
    grid, element("p", { class: "center" }, page.images.length ? next : "Nothing is left here.")));
  grid.querySelector("[data-card]")?.focus();
}

function put(image) {
  const item = card(image, { href: "#", numberText: percent(image.label_score),
    extra: element("span", { class: "verdict" }) });
  const link = item.querySelector("[data-card]");
  link.addEventListener("click", (event) => { event.preventDefault(); toggle(item); link.focus(); });
  link.setAttribute("role", "button");
  link.setAttribute("aria-pressed", "false");
  mark(item, image);
  grid.append(item);
}

function mark(item, image) {
  item.image = image;
  const place = item.querySelector(".card");
  const words = { accept: "accepted", reject: "rejected", relabel: `now ${image.decision?.label}` };
  if (image.decision) place.dataset.action = image.decision.action; else delete place.dataset.action;
  place.classList.toggle("accept", image.decision?.action === "accept");
  place.classList.toggle("reject", image.decision?.action === "reject");
  item.querySelector(".verdict").textContent = image.decision ? words[image.decision.action] : "";
}

function tool(text, key, action) {
  return element("button", { type: "button", onclick: action, "aria-keyshortcuts": key }, text, " ", element("kbd", {}, key));
}

function toggle(item) {
  const on = item.querySelector(".card").classList.toggle("chosen");
  item.querySelector("[data-card]").setAttribute("aria-pressed", String(on));
}

const items = () => (grid?.isConnected ? [...grid.children] : []);
let last = null; // the image that had the focus, when a button was pressed
document.addEventListener("focusin", (event) => { const item = event.target.closest?.("#review > li"); if (item) last = item; });

function targets() {
  const chosen = items().filter((item) => item.querySelector(".chosen"));
  if (chosen.length) return chosen;
  return last && items().includes(last) ? [last] : [];
}

async function say(decisions) {
  const answer = await post("/api/review", { decisions, reviewer: localStorage.getItem("reviewer") ?? "" });
  for (const image of answer.images) {
    const item = items().find((other) => other.image.image_id === image.image_id);
    if (item) mark(item, image);
  }
  return answer.images;
}

function carefully(action) {
  queue = queue.then(action).catch((error) => {
    if (!(error instanceof Refused)) { reportError(error); return; }
    notice(error.message);
    if (error.status === 409) reload(); // the labels are others by now
  });
}

// The label that was seen goes along: another one by now is neither accepted nor rejected.
const said = (item, action, label) => ({ image_id: item.image.image_id, action, label: label ?? item.image.label });

// A decision of an earlier version has no id; the last one on its image is undone then.
const undoing = (image) => ({ image_id: image.image_id, action: "undo", undoes: image.decision.id || undefined });

async function keep(decisions) {
  const images = await say(decisions);
  done.push(images.map(undoing));
}

// What a key means is settled when it is pressed, and so is the image that the next key is for.
function decide(action, label = undefined, on = targets()) {
  if (!on.length) { notice("Choose an image first."); return; }
  const decisions = on.map((item) => said(item, action, label));
  on.forEach((item) => { if (item.querySelector(".chosen")) toggle(item); });
  const next = items()[items().indexOf(on[on.length - 1]) + 1];
  (next ?? on[on.length - 1]).querySelector("[data-card]").focus();
  carefully(() => keep(decisions));
}

function acceptAll() {
  const shown = items();
  carefully(async () => { // by then it is known what was decided of them
    const open = shown.filter((item) => !item.image.decision);
    if (open.length) await keep(open.map((item) => said(item, "accept")));
  });
}

// The last step of this page; without one, the decision on the image with the focus.
function undo() {
  const on = targets();
  carefully(async () => {
    const step = done.pop() ?? on.map((item) => item.image).filter((image) => image.decision).map(undoing);
    if (!step.length) { notice("Nothing was decided on this page yet."); return; }
    try { await say(step); } catch (error) {
      if (!error.status) done.push(step); // it was not heard; what is refused is not asked for again
      throw error;
    }
    const item = items().find((other) => other.image.image_id === step[0].image_id);
    item?.querySelector("[data-card]").focus();
    notice(step.length === 1 ? "Undone." : `Undone: ${number(step.length)} decisions.`);
  });
}

function change() {
  const on = targets();
  if (!on.length) { notice("Choose an image first."); return; }
  const dialog = document.getElementById("help");
  const input = element("input", { type: "text", id: "new-label", list: "known-labels", required: true, maxlength: "512",
    autocomplete: "off" });
  const submit = (event) => {
    event.preventDefault();
    dialog.close();
    decide("relabel", input.value.trim(), on);
  };
  dialog.replaceChildren(element("form", { onsubmit: submit },
    element("label", { class: "field" }, on.length === 1 ? "The right label" : `The right label of ${on.length} images`, input),
    element("datalist", { id: "known-labels" }, labels.map((name) => element("option", { value: name }))),
    element("div", { class: "row center" }, element("button", { type: "submit", class: "primary" }, "Change"),
      element("button", { type: "button", onclick: () => dialog.close() }, "Cancel"))));
  dialog.showModal();
  input.focus();
}

// Whether a key meant something here.
export function key(event) {
  const action = { a: () => decide("accept"), x: () => decide("reject"), c: change, u: undo }[event.key];
  const item = document.activeElement.closest?.("#review > li");
  if (event.key === " " && item) toggle(item);
  else if (action) action();
  else return false;
  event.preventDefault();
  return true;
}
