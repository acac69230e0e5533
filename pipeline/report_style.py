"""What a report's page looks like: its frame, its colours in light and dark, its few lines of script."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>
<body><header><p>cvt-pipeline · {verb}</p><h1>{output}</h1>
<p>{verdict}<span>{when}</span>{run}</p></header>
{stopped}<div class="tiles">{tiles}</div><main>{sections}</main><script>{script}</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --edge: #e3e6eb; --text: #16191f;
  --dim: #667085; --accent: #3267d6; --soft: #3267d622; --track: #eceff3; --bad: #cf3f36;
  --warm: #b45309; --warm-soft: #f59e0b26; --good: #18794e; --good-soft: #18794e1c; --bad-soft: #cf3f361c }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #171b22; --edge: #2a303a;
  --text: #e7eaf0; --dim: #97a1b2; --accent: #6ea0ff; --soft: #6ea0ff2b; --track: #242a34;
  --bad: #ff7b72; --warm: #f5b14c; --warm-soft: #f5b14c24; --good: #57c78f;
  --good-soft: #57c78f22; --bad-soft: #ff7b7222 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
header p { margin: 0; color: var(--dim); display: flex; flex-wrap: wrap; gap: .25rem .9rem;
  align-items: center }
h1 { margin: .15rem 0 .5rem; font-size: 1.6rem; line-height: 1.25; letter-spacing: -.01em;
  overflow-wrap: anywhere }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere }
small { color: var(--dim); font-size: .8rem; font-weight: 400 }
.verdict { border-radius: 1rem; padding: .1rem .7rem; font-weight: 600; font-size: .85rem }
.good { color: var(--good); background: var(--good-soft) } .idle { background: var(--track) }
.verdict.bad { color: var(--bad); background: var(--bad-soft) }
.stopped { border-left: 4px solid var(--bad); background: var(--bad-soft); border-radius: .4rem;
  margin: 1.25rem 0 0; padding: .7rem 1rem; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .75rem;
  margin: 1.25rem 0 .75rem }
.tile, section { background: var(--card); border: 1px solid var(--edge); border-radius: .75rem }
.tile { padding: .8rem 1rem }
.tile span, .tile small { display: block; color: var(--dim); font-size: .8rem }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
main { column-count: 2; column-gap: .75rem }
section { padding: 1.1rem 1.25rem 1.25rem; margin: 0 0 .75rem; break-inside: avoid }
section.wide { column-span: all }
h2 { margin: 0 0 .9rem; font-size: 1rem; display: flex; flex-wrap: wrap; gap: 0 .6rem;
  align-items: baseline }
.empty { color: var(--dim); margin: .4rem 0 0 }
.chart { position: relative; height: 15rem; margin: .5rem .75rem 1.8rem 3.2rem;
  border-bottom: 1px solid var(--dim) }
.chart svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; overflow: visible }
.area { fill: var(--soft) } .line { fill: none; stroke: var(--accent); stroke-width: 2;
  vector-effect: non-scaling-stroke; stroke-linejoin: round }
path.bad { fill: var(--bad); fill-opacity: .45 }
.chart i { position: absolute; font-style: normal } .chart b { font-weight: 400; font-size: .75rem;
  color: var(--dim); position: absolute; white-space: nowrap; font-variant-numeric: tabular-nums }
.grid { left: 0; right: 0; border-top: 1px solid var(--edge) }
.grid b { right: 100%; margin-right: .5rem; transform: translateY(-50%) }
.time { bottom: -5px; height: 5px; border-left: 1px solid var(--dim) }
.time b { top: .35rem; transform: translateX(-50%) }
.startup { left: 0; top: 0; bottom: 0; border-right: 1px dashed var(--dim);
  background: repeating-linear-gradient(135deg, var(--track) 0 4px, transparent 4px 10px) }
.startup b { left: .4rem; top: .25rem; background: var(--card); border-radius: .3rem; padding: 0 .35rem }
.cursor { position: absolute; inset: 0 }
.cursor p { display: none; position: absolute; top: .4rem; margin: 0; padding: .3rem .6rem;
  font-size: .8rem; background: var(--text); color: var(--card); border-radius: .4rem;
  pointer-events: none; white-space: nowrap; transform: translateX(-50%); z-index: 1;
  font-variant-numeric: tabular-nums }
.legend { margin: 0; color: var(--dim); font-size: .8rem; display: flex; gap: .4rem; align-items: center }
.key { width: .8rem; height: .8rem; border-radius: .2rem; background: var(--accent) }
.key.bad { background: var(--bad); opacity: .6; margin-left: .8rem }
.bar { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr) 7.5rem; gap: 0 .75rem;
  align-items: center; margin: .35rem 0; font-variant-numeric: tabular-nums }
.label { overflow-wrap: anywhere; line-height: 1.3 }
.track { height: .85rem; background: var(--track); border-radius: .3rem; overflow: hidden }
.track i { display: block; height: 100%; min-width: 1px; border-radius: .3rem; background: var(--accent) }
.bar small { grid-column: 2 / -1; line-height: 1.2; margin-bottom: .3rem }
.value { font-size: .85rem; text-align: right; white-space: nowrap }
.pale .track i { background: var(--dim); opacity: .55 } .bar.bad .track i { background: var(--bad) }
.limit .label { font-weight: 700 } .limit .track i { background: var(--warm) }
em { font-style: normal; font-size: .7rem; font-weight: 700; color: var(--warm);
  background: var(--warm-soft); border-radius: 1rem; padding: .1rem .45rem; vertical-align: 1px }
.advice { margin: 1rem 0 0; padding: .7rem .9rem; border-radius: .5rem; background: var(--warm-soft) }
details summary { cursor: pointer; list-style: none } summary::-webkit-details-marker { display: none }
summary:hover .label, summary.plain:hover { color: var(--accent) }
summary .label::before, summary.plain::before { content: "▸ "; color: var(--dim) }
[open] > summary .label::before, [open] > summary.plain::before { content: "▾ " }
details ul { margin: .2rem 0 .8rem; padding: .5rem .9rem; list-style: none; background: var(--page);
  border-radius: .5rem } li { overflow-wrap: anywhere; margin: .3rem 0 } li small { display: block }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums } th { color: var(--dim); font-weight: 500 }
th, td { padding: .3rem 0 .3rem .9rem; text-align: right; border-bottom: 1px solid var(--edge);
  white-space: nowrap } tr:last-child td { border-bottom: 0 }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal;
  overflow-wrap: anywhere; min-width: 9rem }
dl { margin: 0; font-size: .88rem } dl div { display: grid; grid-template-columns: 8.5rem minmax(0, 1fr);
  gap: .75rem; padding: .25rem 0; border-bottom: 1px solid var(--edge) }
dl div:last-child { border-bottom: 0 }
ul.failed { list-style: none; margin: 0; padding: 0; font-size: .88rem }
ul.failed li { padding: .3rem 0; margin: 0; border-bottom: 1px solid var(--edge) }
ul.failed li:last-child { border-bottom: 0 }
dt { color: var(--dim); overflow-wrap: anywhere } dd { margin: 0; overflow-wrap: anywhere }
pre { margin: .8rem 0 0; padding: .9rem; background: var(--page); border-radius: .5rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
@media (max-width: 60rem) { .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)) } }
@media (max-width: 46rem) { body { padding: 1.25rem .8rem 3rem } main { column-count: 1 }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)) } section { padding: 1rem }
  .chart { height: 12rem; margin-left: 2.6rem } .time:nth-of-type(even) b { display: none }
  .bar { grid-template-columns: minmax(0, 1fr) auto; margin: .6rem 0 } .value { order: 1 }
  .track { order: 2; grid-column: 1 / -1; margin-top: .2rem } .bar small { order: 3; grid-column: 1 / -1 }
  dl div { grid-template-columns: 6.5rem minmax(0, 1fr) } }
"""

SCRIPT = """
for (const cursor of document.querySelectorAll(".cursor")) {
  const points = JSON.parse(cursor.dataset.points), step = +cursor.dataset.step, tip = cursor.firstChild;
  cursor.onpointermove = event => {
    const box = cursor.getBoundingClientRect(), at = 100 * (event.clientX - box.left) / box.width;
    const point = points[Math.max(0, Math.min(points.length - 1, Math.floor(at / step)))];
    tip.textContent = `from ${point[0]}: ${point[1]} images/s, ${point[2]} rejects`;
    tip.style.display = "block";
    tip.style.left = Math.max(tip.offsetWidth / 2, Math.min(box.width - tip.offsetWidth / 2,
      event.clientX - box.left)) + "px";
  };
  cursor.onpointerleave = () => { tip.style.display = "none" };
}
"""
