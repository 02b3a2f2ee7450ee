"""How the page of samples looks, in light and in dark; no script, no font and no picture from elsewhere."""

from __future__ import annotations

from typing import Final

# seen on white, on black and on pictures; the same in the text and on the picture
COLOURS: Final = ("#d9480f", "#1c7ed6", "#2b8a3e", "#d6336c", "#7950f2", "#0c8599", "#996800", "#6c757d")
"""Of boxes and points; the ninth has the colour of the first, and another number."""

_STYLE: Final = """
:root { color-scheme: light dark; --page: #f6f7f9; --sheet: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0;
  --target: #c3efcf; --target-line: #1a7f37; --shared: #ead9fb; --shared-line: #7a3fc2; --indicator: #ffe7ad;
  --indicator-line: #946000; --slot: #d8e7ff; --slot-line: #1f5fbf; --wrong: #ffe0de; --wrong-line: #b3261e;
  --note: #fff4d1; --bar: #4f7cac; --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1216; --sheet: #171c22; --ink: #e8edf2; --soft: #a3adb8;
  --line: #323a44; --target: #14492a; --target-line: #56d17f; --shared: #43286a; --shared-line: #c69cff;
  --indicator: #55400d; --indicator-line: #ffce5c; --slot: #1a3a6b; --slot-line: #8ab8ff; --wrong: #5e1d1a;
  --wrong-line: #ff9d95; --note: #43380f; --bar: #7fa8d6; --link: #7db7f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0; } h3 { font-size: 1rem; margin: 0; }
a { color: var(--link); } code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
a:focus-visible, input:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
.soft, .meta, .view p, .lead { color: var(--soft); font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.card, article { background: var(--sheet); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.25rem; }
.card h2 { font-size: 1rem; margin-bottom: .5rem; } .card + .card, .cards { margin: 0; }
.block { margin: 1rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem; }
th { text-align: left; font-weight: 400; white-space: nowrap; padding: .1rem .75rem .1rem 0; }
td { padding: .1rem .5rem .1rem 0; } td.number { text-align: right; } td.bar { width: 55%; }
td.bar svg { display: block; width: 100%; height: .7rem; } td.bar rect { fill: var(--bar); }
fieldset { border: 0; margin: .75rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  font-size: .9rem; }
legend { float: left; margin-right: 1.25rem; color: var(--soft); }
table.roles { max-width: 40rem; margin-bottom: .75rem; }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .35rem 1.5rem;
  font-size: .9rem; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem; padding: 0; margin: .5rem 0 0;
  font-size: .875rem; }
nav a { display: block; padding: .15rem .55rem; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--sheet); text-decoration: none; }
nav a.broken { background: var(--wrong); border-color: var(--wrong-line); color: var(--ink); }
nav a.left-out { background: var(--note); color: var(--ink); border-style: dashed; }
article { margin: 1.25rem 0; scroll-margin-top: 1rem; }
article > header { padding: 0; display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem .75rem; }
article > header a { margin-left: auto; font-size: .875rem; }
.state { font-size: .8rem; padding: 0 .5rem; border-radius: 1rem; border: 1px solid var(--line); color: var(--ink); }
.state.broken { background: var(--wrong); border-color: var(--wrong-line); }
.state.left-out { background: var(--note); }
.problems, .problem { background: var(--wrong); border-left: 4px solid var(--wrong-line); }
.problems, .problem, .notes { margin: .6rem 0; padding: .4rem .8rem; border-radius: .3rem; list-style: none;
  overflow-wrap: anywhere; }
.notes { background: var(--note); border-left: 4px solid var(--indicator-line); }
.piece { border-top: 1px solid var(--line); margin-top: .9rem; padding-top: .75rem; }
.piece .meta { margin: .1rem 0 .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; margin: .5rem 0; }
.target, .context, .shared, .indicator { border-radius: .2rem; padding: .12rem 0; }
.target { background: var(--target); box-shadow: inset 0 -2px var(--target-line); }
.context { color: var(--soft); }
.shared { background: var(--shared); outline: 1px dashed var(--shared-line); }
.shared::before { content: "⤷"; color: var(--shared-line); }
.indicator { background: var(--indicator); box-shadow: inset 0 2px var(--indicator-line); }
.mark { font: .85em ui-monospace, monospace; opacity: .8; }
.slot { background: var(--slot); border: 1px solid var(--slot-line); border-radius: .3rem; padding: .05rem .35rem;
  font-size: .85rem; white-space: nowrap; }
.region { border-bottom: 3px solid var(--mine); padding-bottom: 0; }
.region[data-n]::before { content: attr(data-n); }
.region[data-n]::before, .badge { background: var(--mine); color: #fff; border-radius: .3rem;
  font: 700 .75rem/1.2 system-ui, sans-serif; padding: .05rem .3rem; margin: 0 .15rem; vertical-align: .1em; }
body:has(#edges:checked) :is(.target, .context, .shared, .indicator) { border-right: 1px solid var(--soft);
  margin-right: 1px; }
body:has(#ids:checked) :is(.target, .context, .shared, .indicator)::after { content: attr(title);
  font: .65rem/1 ui-monospace, monospace; color: var(--soft); vertical-align: super; margin: 0 .25rem 0 .1rem;
  white-space: nowrap; }
:is(.target, .context, .shared, .indicator):hover { outline: 2px solid var(--link); }
.image { margin: .6rem 0; padding: .75rem; border: 1px solid var(--line); border-radius: .5rem;
  background: var(--page); }
figcaption { font-size: .9rem; margin-bottom: .5rem; }
.views { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-end; }
.view { max-width: 100%; min-width: min(100%, 17rem); }
.view p { margin: .25rem 0 0; width: 0; min-width: 100%; } /* as wide as the picture, whatever the text */
.canvas { position: relative; display: inline-block; max-width: 100%; vertical-align: top; }
.canvas > svg { display: block; position: relative; max-width: 100%; height: auto; overflow: hidden; }
.tiles { position: absolute; inset: 0; display: flex; flex-direction: column; }
.tiles > div { flex: 1 1 0; min-height: 0; display: flex; }
.tiles img { flex: 1 1 0; min-width: 0; width: 100%; height: 100%; display: block; }
.pixelated img { image-rendering: pixelated; }
.padding { fill: url(#hatch); } .edge { fill: none; stroke: #fff; stroke-opacity: .8; stroke-width: 1;
  vector-effect: non-scaling-stroke; }
.plate { fill: #000; fill-opacity: .65; } .label text { fill: #fff; font-family: system-ui, sans-serif; }
.drawn .halo, .drawn .line { fill: none; vector-effect: non-scaling-stroke; }
.drawn .halo { stroke: #fff; stroke-opacity: .85; stroke-width: 5; }
.drawn .line { stroke: var(--mine); stroke-width: 2.5; }
.drawn.doubtful .line { stroke-dasharray: 7 4; }
.badge-plate { fill: var(--mine); } .drawn text { fill: #fff; font-weight: 700; font-family: system-ui, sans-serif; }
body:has(#boxes:not(:checked)) .drawn, body:has(#labels:not(:checked)) :is(.label, .padding) { display: none; }
.row-order { margin: .6rem 0 0; line-height: 2; } .lead { margin-right: .75rem; }
.regions { list-style: none; margin: .5rem 0 0; padding: 0; font-size: .9rem; }
body:has(#full:checked) .canvas, body:has(#full:checked) .canvas > svg { max-width: none; }
body:has(#full:checked) .view { overflow-x: auto; }
footer { color: var(--soft); font-size: .875rem; margin-bottom: 2rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; } }
"""


def style(*, tile_size: int, widest: int) -> str:
    """Return the style sheet.

    Args:
        tile_size: side of a tile, which is shown pixel by pixel on request.
        widest: columns of tiles of the widest view.
    """
    mine = [f".r{number} {{ --mine: {colour}; }}" for number, colour in enumerate(COLOURS, start=1)]
    full = [
        f"body:has(#full:checked) .w{n} > svg {{ width: {n * tile_size}px; }}" for n in range(1, max(widest, 1) + 1)
    ]
    return _STYLE + "\n".join([*mine, *full]) + "\n"
