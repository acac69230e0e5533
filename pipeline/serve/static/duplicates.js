// Groups of duplicates side by side; the framed one stands for its group.

import { get } from "/static/api.js";
import { card, element, number, telling } from "/static/dom.js";

export async function show(main, parameters, { addressOf, signal }) {
  const first = await get("/api/duplicates", [], signal);
  const place = element("div", {});
  const put = (group) => place.append(element("section", { class: "group", "aria-label": `Group ${group.group + 1}` },
    element("h2", {}, `Group ${number(group.group + 1)}: ${number(group.size)} images`),
    element("ul", { class: "grid" }, group.images.map((image) => card(image, {
      href: addressOf("search", [["id", image.image_id]]),
      numberText: image.representative ? "kept" : image.similarity.toFixed(4),
      chosen: image.representative,
    })))));
  first.groups.forEach(put);
  let { next } = first;
  const more = element("button", { type: "button", onclick: () => telling(async () => {
    const page = await get("/api/duplicates", [["after", next]]);
    page.groups.forEach(put);
    ({ next } = page);
    more.hidden = next === null;
  }) }, "More groups");
  more.hidden = next === null;
  const title = first.version
    ? `${number(first.total)} groups of duplicates, ${number(first.images_in_groups)} images, cosine ${first.threshold} and more`
    : "No duplicates were looked for yet";
  main.className = "wide";
  main.replaceChildren(element("h1", {}, title),
    first.version ? place : element("p", { class: "dim" }, "Run: cvt-pipeline dedup OUTPUT"),
    element("p", { class: "center" }, more));
}
