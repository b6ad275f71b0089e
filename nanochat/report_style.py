"""What every part of the report shares: the style sheet (system fonts, series colours that colour-blind eyes can tell
apart, two themes), and any value as HTML text."""

from __future__ import annotations

import re
from html import escape
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fff;--ink:#16161a;--soft:#5b5b63;--faint:#8b8b93;--rule:#e4e4de;
--s0:#2a6fd0;--s1:#d9602b;--s2:#158f72;--s3:#8a63c9;--s4:#b8860b;--s5:#7d8590;--good:#12803c;--bad:#c43030}
@media (prefers-color-scheme:dark){:root{--page:#101013;--card:#1a1a1e;--ink:#f1f1f3;--soft:#b3b3bc;--faint:#82828c;
--rule:#303036;--s0:#5b9cf2;--s1:#ee8455;--s2:#35b795;--s3:#ab8be3;--s4:#d6a93a;--s5:#9aa2ad;--good:#4cc27a;--bad:#f07070}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:32px 20px 48px}
header h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
header p{margin:0 0 12px;color:var(--soft)}
.chips{display:flex;flex-wrap:wrap;gap:3px;margin-bottom:20px}
.chip{min-width:30px;padding:1px 6px;border-radius:4px;text-align:center;font-size:12px;font-weight:600;color:#fff}
.chip.s0{background:var(--s0)}.chip.s1{background:var(--s1)}.chip.s2{background:var(--s2)}
@media (prefers-color-scheme:dark){.chip{color:#101013}}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-bottom:16px}
.tile,section{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:14px 16px}
.what{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.big{font-size:30px;font-weight:650;line-height:1.25;letter-spacing:-.02em}
.note{color:var(--faint);font-size:12.5px}
section{padding:18px 20px;margin-bottom:16px}
h2{font-size:17px;margin:0 0 12px}h3{font-size:14px;margin:16px 0 8px}
.facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:0 0 10px}
.facts dt{color:var(--faint);font-size:12.5px}.facts dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:8px 28px}
figure{margin:0;max-width:680px}
.chart{width:100%;height:auto;display:block;overflow:visible}
.chart text{font-size:12px;fill:var(--soft)}
.chart .tick{font-size:11.5px;fill:var(--faint);font-variant-numeric:tabular-nums}
.chart .key{font-size:12.5px;fill:var(--ink)}
.chart .end{font-size:12px;font-weight:600;font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--faint);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.line.s0{stroke:var(--s0)}.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}
.line.faint{stroke-width:1;opacity:.32}
.dot{stroke:var(--card);stroke-width:1.5}.dot.s0{fill:var(--s0)}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.18}
.chart .t0{fill:var(--s0)}.chart .t1{fill:var(--s1)}.chart .t2{fill:var(--s2)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th{text-align:left;font-weight:500;color:var(--faint);font-size:12.5px}
td,th{padding:5px 16px 5px 0;border-bottom:1px solid var(--rule);vertical-align:middle}
tr:last-child td,tr:last-child th{border-bottom:0}
.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13px;overflow-wrap:anywhere}
.num{font-variant-numeric:tabular-nums;white-space:nowrap}
.pairs{width:auto}.pairs td{overflow-wrap:anywhere}.pairs th{white-space:nowrap;vertical-align:top;padding-top:7px}
.whisker{width:160px;height:14px;display:block}.whisker .axis{stroke:var(--rule);stroke-width:2}
.range{stroke:var(--s0);stroke-width:4;stroke-linecap:round;opacity:.42}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:10px}
article{border:1px solid var(--rule);border-radius:8px;padding:10px 14px;overflow-wrap:anywhere}
article p{margin:0 0 4px;white-space:pre-wrap;max-height:10.6em;overflow:auto}
.meta{color:var(--faint);font-size:12px}.user{color:var(--soft)}.model{font-weight:500}
.model b{font-weight:400;color:var(--soft)}
.gold{color:var(--soft);font-size:13px}.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
.bar{display:flex;gap:2px;height:22px;border-radius:6px;overflow:hidden}.bar div{flex-basis:0;min-width:2px}
.b0{background:var(--s0)}.b1{background:var(--s1)}.b2{background:var(--s2)}
.b3{background:var(--s3)}.b4{background:var(--s4)}.b5{background:var(--s5)}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:10px 0 0;padding:0;color:var(--soft)}
.keys i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.keys b{color:var(--ink);font-weight:600}
details{margin-top:8px}summary{cursor:pointer;color:var(--soft)}
pre{background:var(--page);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:12.5px}
footer{color:var(--faint);font-size:12.5px}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def text(value: Any) -> str:
    """Any value as HTML text: escaped, without characters that HTML forbids."""
    return escape(_CONTROL.sub("\ufffd", str(value)))
