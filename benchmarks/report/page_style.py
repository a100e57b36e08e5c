"""How the page looks: on a screen, a narrow one and paper."""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.5rem 4rem; max-width: 82rem; background: #fff; color: #1a1a1a;
  font: 15px/1.5 "DejaVu Sans", Verdana, Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .6rem 0; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: .8rem; border-top: 2px solid #1a1a1a; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p, ul { max-width: 62rem; margin: .5rem 0; }
a { color: #004b87; }
pre { background: #f4f4f4; border: 1px solid #ddd; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 "DejaVu Sans Mono", Consolas, monospace; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: 13px; line-height: 1.35; border-bottom: 1.5px solid #1a1a1a; }
caption { text-align: left; font-size: 13px; color: #444; padding-bottom: .4rem; }
th, td { padding: .28rem .6rem; text-align: right; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
thead th { white-space: normal; vertical-align: bottom; border-top: 1.5px solid #1a1a1a;
  border-bottom: 1px solid #1a1a1a; }
th:first-child { text-align: left; }
tbody th { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; max-width: 18rem; }
tbody tr + tr > * { border-top: 1px solid #e6e6e6; }
td small { display: block; color: #555; font-size: 11px; }
table.text td, table.text thead th { text-align: left; white-space: normal; overflow-wrap: break-word; }
table.text td { max-width: 34rem; }
table.text td.figure { white-space: nowrap; }
table.matrix td { text-align: center; font-size: 12px; }
table.matrix td.differs { background: #e8eef7; font-weight: 600; }
table.matrix td.self { color: #999; }
table.matrix thead th { max-width: 12rem; white-space: normal; text-align: center; }
table.matrix thead th:first-child { text-align: left; }
.warning { border: 2px solid #a33b00; border-left-width: 10px; background: #fff6f0; padding: .5rem .9rem;
  margin: 1rem 0; max-width: 62rem; }
.warning strong { color: #7a2c00; }
.mark { font-weight: 400; font-size: 11px; color: #444; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1.2rem 1.5rem; }
.matrices { display: flex; flex-wrap: wrap; align-items: flex-start; }
figure { margin: 0; max-width: 100%; break-inside: avoid; }
figcaption { font-size: 12.5px; color: #444; max-width: 34rem; }
.matrices figcaption { max-width: 18rem; }
svg { display: block; max-width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg [id*="QuadMesh"] path { shape-rendering: crispEdges; }
.settings { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
details { margin: .6rem 0; border: 1px solid #ddd; padding: .35rem .8rem; }
summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; margin-top: .4rem; }
dd { margin: 0 0 0 1.2rem; max-width: 60rem; }
@media (max-width: 900px) { body { padding: .6rem .8rem 3rem; } th, td { padding: .25rem .4rem; }
  table { font-size: 12px; } }
@media print {
  @page { margin: 14mm; }
  body { font-size: 9.5pt; padding: 0; max-width: none; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; } td small { font-size: 6.5pt; }
  .scroll { overflow: visible; } nav { break-after: avoid; }
  h2, h3, caption { break-after: avoid; } tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
}
""".strip()
