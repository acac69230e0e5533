// What the output holds: counts, rejects, labels, runs.

import { get } from "/static/api.js";
import { element, number } from "/static/dom.js";

let known = null;

// Facts that do not change while the server runs, asked for once.
export const facts = () => { known ??= get("/api/overview"); known.catch(() => { known = null; }); return known; };

export async function show(main, parameters, { addressOf, signal }) {
  const found = await get("/api/overview", [], signal);
  const { status, index, labels } = found;
  const tile = (name, value) => element("div", { class: "tile" }, element("b", {}, value), name);
  main.className = "wide";
  main.replaceChildren(
    element("h1", {}, found.output),
    element("div", { class: "tiles" }, tile("images", number(status.images)), tile("rejects", number(status.rejects)),
      tile("shards", number(status.shards)), tile("MB", number(Math.round(status.size_bytes / 1e4) / 100)),
      tile("in the index", index ? number(index.num_vectors) : "none"),
      tile("recall@10", index?.recall_at_10 === undefined || index === null ? "–" : String(index.recall_at_10)),
      tile("labels decided", labels ? number(Object.values(labels.decisions).reduce((sum, it) => sum + it, 0)) : "–")),
    element("p", { class: "dim" }, `${status.checkpoint}, ${status.precision}`),
    found.no_index ? element("p", { class: "problem" }, found.no_index) : "",
    element("h2", {}, "Labels"),
    labels ? bars(labels.labels.map((it) => [it.label, it.count,
      addressOf("search", [["facet", `label:${it.label}`]])])) : element("p", { class: "dim" }, "No labels."),
    element("h2", {}, "Rejects by reason"),
    status.rejects ? bars(Object.entries(status.rejects_by_reason)) : element("p", { class: "dim" }, "None."),
    element("h2", {}, "Runs"), runs(found.runs));
}

function bars(entries) {
  const most = Math.max(1, ...entries.map(([, count]) => count));
  return element("ul", { class: "bars" }, entries.slice(0, 50).map(([name, count, href]) => {
    const fill = element("div", { class: "fill" });
    fill.style.width = `${(100 * count) / most}%`;
    return element("li", {}, href ? element("a", { class: "name", href, title: name }, name)
      : element("span", { class: "name", title: name }, name),
    element("div", { class: "track" }, fill), element("span", { class: "count" }, number(count)));
  }));
}

function runs(entries) {
  if (!entries.length) return element("p", { class: "dim" }, "No reports.");
  const names = ["run", "images", "rejects", "seconds", "images/s", "limited by", "stopped"];
  const rows = entries.map((run) => element("tr", {},
    element("td", {}, run.page ? element("a", { href: `/reports/${encodeURIComponent(run.run)}.html`, target: "_blank",
      rel: "noopener" }, run.run) : run.run),
    ...[number(run.images), number(run.rejects), run.seconds?.toFixed?.(0) ?? "", run.images_per_s?.toFixed?.(1) ?? "",
      run.limiting_stage ?? "", run.stopped ?? ""].map((text) => element("td", {}, String(text)))));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Runs" }, element("table", {},
    element("thead", {}, element("tr", {}, names.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, rows)));
}
