"""Style and script of report.html: no fonts, no libraries, nothing fetched."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5c646e; --line: #dfe3e8; --page: #fafbfc;
  --card: #fff; --blue: #0072b2; --orange: #c85000; --gray: #9aa1aa; --code: #f1f3f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a2abb6; --line: #343a42;
  --page: #15181c; --card: #1d2126; --blue: #4fb3e8; --orange: #ff9142; --gray: #737b86;
  --code: #272c33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
header .kicker, .note, figcaption { color: var(--soft); font-size: 13px; }
h1 { font-size: 25px; line-height: 1.3; margin: 6px 0 14px; text-wrap: balance; }
h2 { font-size: 18px; margin: 40px 0 10px; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.banner { border: 1px solid var(--orange); border-radius: 8px; padding: 10px 14px; margin: 12px 0; }
.banner ul { margin: 4px 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; min-width: 0; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .small { font-size: 13px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.wide { min-width: 210px; }
td.tight { white-space: nowrap; }
table.sortable th button { all: unset; cursor: pointer; }
table.sortable th button:focus-visible { outline: 2px solid var(--blue); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.pick td { font-weight: 600; }
tr.lit td { background: color-mix(in srgb, var(--blue) 12%, transparent); }
.mark { display: inline-block; border-radius: 4px; padding: 0 6px; margin-left: 4px;
  font-size: 12px; font-weight: 600; color: var(--card); background: var(--blue); }
.mark.lora { background: var(--orange); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 13px; }
pre { background: var(--code); border-radius: 8px; padding: 10px 12px; overflow-x: auto;
  margin: 6px 0; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  margin: 8px 0; }
summary { cursor: pointer; padding: 10px 14px; }
details > .inside { padding: 0 16px 14px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 6px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figure img { width: 100%; border-radius: 8px; background: #fff; display: block; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 14px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); }
svg text.axis { font-size: 13px; fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .trial { fill: var(--gray); opacity: .5; }
svg .trial.lora { fill: var(--orange); }
svg .reference { stroke: var(--ink); stroke-dasharray: 5 4; opacity: .7; }
svg .front-line { fill: none; stroke: var(--blue); opacity: .4; }
svg .dot { cursor: pointer; color: var(--blue); } svg .dot.lora { color: var(--orange); }
svg .dot.beaten { color: var(--gray); }
svg .dot line { stroke: currentColor; stroke-width: 1.6; } svg .dot circle { fill: currentColor; }
svg .dot.beaten circle { fill: var(--card); stroke: currentColor; stroke-width: 1.5; }
svg .dot .ring { fill: none; stroke: var(--ink); stroke-width: 1.6; }
svg .dot text { fill: var(--card); font-weight: 700; pointer-events: none; }
svg .dot.lit circle:not(.ring) { stroke: var(--ink); stroke-width: 2; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); font-size: 13px; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
#tip { position: fixed; z-index: 2; pointer-events: none; white-space: pre-line; max-width: 340px;
  background: var(--ink); color: var(--page); border-radius: 8px; padding: 8px 11px;
  font-size: 13px; }
table.map { width: auto; border-collapse: separate; border-spacing: 2px; font-size: 12px; }
table.map th, table.map td { border: 0; padding: 2px 6px; text-align: center; }
table.map td { background: var(--code); min-width: 44px; height: 23px; border-radius: 4px;
  white-space: nowrap; }
table.map td.site { color: var(--ink);
  background: color-mix(in srgb, var(--blue) calc(var(--depth) * 55%), var(--code)); }
table.map td.plain { background: color-mix(in srgb, var(--orange) 30%, var(--code)); }
@media print { details { break-inside: avoid; } }
"""

SCRIPT = """
(() => {
  const tip = document.getElementById("tip");
  const light = (digest, on) => document.querySelectorAll("[data-digest]").forEach(item => {
    if (item.dataset.digest === digest) item.classList.toggle("lit", on);
  });
  document.querySelectorAll("[data-digest]").forEach(item => {
    item.addEventListener("pointerenter", () => {
      light(item.dataset.digest, true);
      if (item.dataset.tip) { tip.textContent = item.dataset.tip; tip.hidden = false; }
    });
    item.addEventListener("pointermove", event => {
      const room = tip.getBoundingClientRect();
      tip.style.left = Math.min(event.clientX + 14, innerWidth - room.width - 8) + "px";
      tip.style.top = Math.min(event.clientY + 14, innerHeight - room.height - 8) + "px";
    });
    item.addEventListener("pointerleave", () => {
      light(item.dataset.digest, false);
      tip.hidden = true;
    });
  });
  document.querySelectorAll("svg [data-digest]").forEach(dot => {
    dot.addEventListener("click", () => {
      const card = document.getElementById("member-" + dot.dataset.digest);
      if (card) { card.open = true; card.scrollIntoView({ behavior: "smooth" }); }
    });
  });
  const key = cell => {
    const number = parseFloat(cell.dataset.value);
    return Number.isNaN(number) ? cell.textContent : number;
  };
  document.querySelectorAll("table.sortable").forEach(table => {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a.cells[column]), key(b.cells[column])];
        const numbers = typeof x === "number" && typeof y === "number";
        return sign * (numbers ? x - y : String(x).localeCompare(String(y)));
      });
      body.append(...rows);
    }));
  });
})();
"""
