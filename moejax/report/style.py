"""The look of a report page: one column, tables that scroll by themselves, light and dark."""

STYLE = """\
:root {
  color-scheme: light dark;
  --text: #1c1f23; --quiet: #5c636b; --page: #fff; --line: #dfe3e8; --shade: #f5f7f9;
  --accent: #0b5d97; --good: #00694a; --bad: #a63c00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e4e7ea; --quiet: #a0a8b0; --page: #15181b; --line: #333a41; --shade: #1e2327;
    --accent: #7cbdec; --good: #4fc79b; --bad: #f0955c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; font-weight: 650; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1rem 0 1.4rem; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
.lead { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem 1rem; }
.lead p { font-size: 1.12rem; max-width: 50rem; }
.table { overflow-x: auto; margin: .4rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem .38rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--quiet); font-weight: 550; white-space: nowrap; vertical-align: bottom; }
thead:not(:has(th:not(:empty))) { display: none; }
tbody th { font-weight: 550; padding-right: 1.4rem; min-width: 8.5rem; max-width: 18rem;
  overflow-wrap: anywhere; }
td { overflow-wrap: break-word; min-width: 7rem; max-width: 34rem; }
td.number { min-width: 0; }
td.number, th.number { text-align: right; white-space: nowrap; padding-left: .6rem; }
tr.marked > * { background: var(--shade); }
[title] { text-decoration: none; cursor: help; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr));
  gap: 1.2rem; margin: .8rem 0 1.4rem; }
.figures.wide { grid-template-columns: 1fr; }
figure { margin: 0; min-width: 0; }
figure div { overflow-x: auto; border-radius: 6px; }
img { display: block; width: 100%; min-width: 26rem; height: auto; background: #fff; }
.wide img { min-width: 42rem; }
figcaption { padding-top: .4rem; max-width: 50rem; }
.verdicts { list-style: none; padding: 0; margin: .5rem 0; }
.verdicts li { padding: .4rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.verdicts span { font-weight: 550; margin: 0 .4rem; }
.held { color: var(--good); }
.failed { color: var(--bad); }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .95rem; }
pre { background: var(--shade); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media print { nav { display: none; } .table { overflow: visible; } }
"""
