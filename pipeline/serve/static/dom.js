// Elements, notices and cards. Text goes into the page as text, never as markup.

import { Refused } from "/static/api.js";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

// A refusal of what a button asked for is told; anything else is a fault of ours.
export async function telling(action) {
  try { await action(); } catch (error) {
    if (!(error instanceof Refused)) throw error;
    notice(error.message);
  }
}

let fading = 0;
export function notice(text) {
  const place = document.getElementById("notice");
  place.textContent = text;
  clearTimeout(fading);
  fading = setTimeout(() => { place.textContent = ""; }, 6000);
}

export const number = (value) => (value ?? 0).toLocaleString("en");
export const percent = (value) => (value === null || value === undefined ? "" : `${(100 * value).toFixed(0)} %`);
export const named = (label) => label !== null && label !== undefined && !/^LABEL_\d+$/.test(label);

export function thumbnail(image, size = 256) {
  const source = `/api/thumbnail?${new URLSearchParams({ id: image.image_id, size, of: image.sha256 ?? "" })}`; // another picture, another address
  return element("img", { src: source, alt: image.image_id, loading: "lazy", width: 256, height: 256 });
}

// A card of the grid: a picture that searches by itself, a button for all that is known, a few facts.
export function card(image, { href, numberText, chosen, extra } = {}) {
  const label = named(image.label) ? image.label : "";
  const link = element("a", { class: "picture", href, "data-card": true }, thumbnail(image));
  const facts = element("div", { class: "facts" },
    element("div", { class: "top" },
      element("span", { class: "label", title: label }, label || " "),
      element("span", { class: "number" }, numberText ?? "")),
    element("span", { class: "id", title: image.image_id }, image.image_id), extra);
  const more = element("button", { type: "button", class: "more", "aria-label": `Details of ${image.image_id}`,
    onclick: () => document.dispatchEvent(new CustomEvent("details", { detail: image })) }, "i");
  const made = element("li", {}, element("article", { class: `card${chosen ? " best" : ""}` }, link, more, facts));
  made.image = image;
  return made;
}

// Arrow keys go from card to card; left and right through the order, up and down by rows as they are seen.
export function moveAmongCards(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: "down", ArrowUp: "up" }[event.key];
  if (!step) return false;
  const cards = [...document.querySelectorAll("[data-card]")];
  const at = cards.indexOf(document.activeElement);
  if (!cards.length) return false;
  let next = 0;
  if (at >= 0 && typeof step === "number") next = at + step;
  if (at >= 0 && typeof step === "string") {
    const here = cards[at].getBoundingClientRect();
    const rows = cards.map((other, place) => [other.getBoundingClientRect(), place])
      .filter(([box]) => (step === "down" ? box.top > here.top + 5 : box.top < here.top - 5));
    if (!rows.length) return false;
    const level = (step === "down" ? Math.min : Math.max)(...rows.map(([box]) => box.top));
    const row = rows.filter(([box]) => Math.abs(box.top - level) < 5);
    next = row.reduce((best, other) =>
      (Math.abs(other[0].left - here.left) < Math.abs(best[0].left - here.left) ? other : best))[1];
  }
  if (next < 0 || next >= cards.length) return false;
  cards[next].focus();
  event.preventDefault();
  return true;
}
