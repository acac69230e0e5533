// Search and browse: neighbours of an image, or all images, under a filter and facets.

import { get, post } from "/static/api.js";
import { searchByFile } from "/static/app.js";
import { card, element, named, number, percent, telling, thumbnail } from "/static/dom.js";
import * as overview from "/static/overview.js";

const filterOf = (parameters) => [...parameters].filter(([name]) => name === "where" || name === "facet");
const queryOf = (parameters) => [...parameters].filter(([name]) => name === "id" || name === "upload");

export async function show(main, parameters, { go, addressOf, signal }) {
  const filter = filterOf(parameters);
  const query = queryOf(parameters).slice(0, 1);
  const [facts, facets, found] = await Promise.all([
    overview.facts(),
    get("/api/facets", filter, signal),
    query.length ? get("/api/search", [...query, ...filter], signal) : get("/api/images", filter, signal),
  ]);
  const address = (pairs) => addressOf("search", pairs);
  const grid = element("ul", { class: "grid" });
  const put = (image) => grid.append(card(image, {
    href: address([["id", image.image_id], ...filter]),
    numberText: image.score === undefined ? percent(image.label_score) : image.score.toFixed(4),
  }));
  (found.hits ?? found.images).forEach(put);
  const images = element("section", { "aria-label": "Images" }, form(parameters, facts, { go, address }),
    about(query, found, facets.total, filter), grid);
  if (query.length === 0) images.append(moreButton(found, filter, put));
  main.className = "";
  main.replaceChildren(sidebar(facets, parameters, { go, address }), images);
}

function form(parameters, facts, { go, address }) {
  const id = element("input", { type: "search", id: "id", value: parameters.get("id") ?? "", autocomplete: "off",
    placeholder: "image id" });
  const where = element("input", { type: "search", id: "where", value: parameters.get("where") ?? "",
    autocomplete: "off", spellcheck: "false", placeholder: "label = 'cat' AND width > 500" });
  const file = element("input", { type: "file", accept: "image/*", hidden: true, id: "file",
    onchange: () => { if (file.files[0]) searchByFile(file.files[0]); } });
  const submit = (event) => {
    event.preventDefault();
    const keep = [...parameters].filter(([name]) => name === "facet" || (name === "upload" && !id.value));
    go(address([...keep, ["id", id.value.trim()], ["where", where.value.trim()]]));
  };
  const buttons = element("div", { class: "row" },
    element("button", { type: "submit", class: "primary" }, "Search"),
    element("button", { type: "button", onclick: () => file.click() }, "Image …"),
    facts.allow_urls ? element("button", { type: "button", onclick: () => byUrl(go, address) }, "URL …") : null, file);
  return element("form", { class: "bar", role: "search", onsubmit: submit },
    element("label", { class: "field" }, "Like the image", id), element("label", { class: "field" }, "Filter (SQL)", where),
    buttons);
}

async function byUrl(go, address) {
  const url = prompt("Address of an image");
  if (!url) return;
  await telling(async () => {
    const answer = await post("/api/uploads/url", { url });
    go(address([["upload", answer.upload]]));
  });
}

function about(query, found, total, filter) {
  const among = filter.length ? `of ${number(total)} that pass the filter` : `of ${number(total)}`;
  if (!query.length) return element("h1", {}, `${number(total)} images`);
  const [[kind, name]] = query;
  const picture = kind === "id" ? thumbnail(found.query)
    : element("img", { src: `/api/uploads/thumbnail?${new URLSearchParams({ upload: name })}`, alt: "your image" });
  const label = kind === "id" && named(found.query.label) ? element("p", { class: "dim" }, found.query.label) : null;
  return element("div", { class: "query" }, picture, element("div", {},
    element("h1", {}, `${number(found.hits.length)} nearest ${among}`),
    element("div", {}, kind === "id" ? name : "your image"), label));
}

function moreButton(found, filter, put) {
  let { next } = found;
  const button = element("button", { type: "button", onclick: () => telling(async () => {
    const page = await get("/api/images", [...filter, ["after", next]]);
    page.images.forEach(put);
    ({ next } = page);
    button.hidden = next === null;
  }) }, "More images");
  button.hidden = next === null;
  return element("p", { class: "center" }, button);
}

function sidebar(facets, parameters, { go, address }) {
  const chosen = new Set(parameters.getAll("facet"));
  const wide = matchMedia("(min-width: 48rem)").matches;
  const change = (text, on) => {
    const rest = [...parameters].filter(([name, value]) => name !== "view" && !(name === "facet" && value === text));
    go(address(on ? [...rest, ["facet", text]] : rest));
  };
  const blocks = facets.facets.map((facet) => {
    const shown = new Map(facet.values.map((entry) => [entry.value, entry.count]));
    for (const text of chosen) {
      const value = text.startsWith(`${facet.name}:`) ? text.slice(facet.name.length + 1) : undefined;
      if (value !== undefined && !shown.has(value)) shown.set(value, 0);
    }
    const entries = [...shown].map(([value, count]) => {
      const text = `${facet.name}:${value}`;
      const box = element("input", { type: "checkbox", checked: chosen.has(text), onchange: () => change(text, box.checked) });
      return element("li", {}, element("label", {}, box, element("span", { class: "name", title: value }, value || "(empty)"),
        element("span", { class: "count" }, number(count))));
    });
    const open = wide || [...chosen].some((text) => text.startsWith(`${facet.name}:`));
    return element("details", { open }, element("summary", {}, facet.name),
      element("ul", { class: "choices", tabindex: "0", "aria-label": facet.name }, entries));
  });
  return element("aside", { "aria-label": "Facets" }, blocks);
}
