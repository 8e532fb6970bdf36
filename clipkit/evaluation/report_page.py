"""The page around a report: its style, and the pieces of HTML that are used all over. No numbers are made here."""

import base64
import html
import io
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

THUMBNAIL_SIZE = 128  # pixels of the longer side, at most: about 4 kB a picture
JPEG_QUALITY = 80

STYLE = """
:root{--paper:#fff;--panel:#f6f7f9;--ink:#191c21;--soft:#5d6570;--line:#e3e6ea;--accent:#2456c6;--pale:#c9d7f5;--middle:#9db7ee;
--other:#9aa2ad;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14161a;--panel:#1c1f25;--ink:#e7e9ec;--soft:#9aa3ae;
--line:#2d323a;--accent:#7fa7ff;--pale:#2c406e;--middle:#466bb8;--other:#6d7580}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Inter,
"Noto Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:56px 32px 72px}
h1{font-size:34px;line-height:1.2;letter-spacing:-.02em;margin:0 0 4px;font-weight:650}
h2{font-size:25px;line-height:1.25;letter-spacing:-.015em;margin:0 0 4px;font-weight:640;overflow-wrap:anywhere}
h3{font-size:17px;margin:44px 0 4px;font-weight:640}
p{margin:4px 0;max-width:72ch}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.soft,figcaption,small{color:var(--soft)}
.soft{font-size:14.5px;max-width:88ch}.lead{margin-top:14px}
.eyebrow{color:var(--accent);font-size:13.5px;font-weight:600;margin:0 0 10px}
section{margin-top:72px;padding-top:40px;border-top:1px solid var(--line)}
dl.facts{display:flex;flex-wrap:wrap;gap:16px 44px;margin:28px 0 0}
dl.facts div{min-width:0}
dt{font-size:13px;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
nav{margin-top:28px;display:flex;flex-wrap:wrap;gap:4px 22px;font-size:15px}
.scroll{overflow-x:auto;margin:14px 0 0}
table{border-collapse:collapse;width:100%}
th{font-size:13px;font-weight:500;color:var(--soft);text-align:left;vertical-align:bottom}
th,td{padding:9px 20px 9px 0;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
td{vertical-align:top}
tbody tr.same td{border-bottom-color:transparent}
td.size{color:var(--soft);white-space:nowrap}
td.metric{min-width:96px}
td.metric div{display:flex;flex-wrap:wrap;align-items:baseline;column-gap:7px;max-width:150px}
td.metric b{font-size:19px;font-weight:620;line-height:1.25;letter-spacing:-.01em}
td.metric small{font-size:12.5px;white-space:nowrap}
td.name{font-weight:600;overflow-wrap:break-word;min-width:110px}
.interval{display:block;width:100%;max-width:136px;height:6px;margin-top:4px}
.track{fill:var(--line)}.range{fill:var(--middle)}.mark{fill:var(--accent)}
.difference .range:not(.clear){fill:var(--line)}.difference .mark:not(.clear){fill:var(--other)}
.effects td,.effects th{padding-top:5px;padding-bottom:5px;font-size:14px;white-space:nowrap}
.effects td:first-child{white-space:normal;min-width:200px;overflow-wrap:anywhere}.effects .interval{width:120px;
display:inline-block;vertical-align:middle;margin:0}
.effects tr.whole td{font-weight:620}
.meanings{columns:2;column-gap:40px;margin:14px 0 0;padding:0;list-style:none;font-size:13.5px;color:var(--soft)}
.meanings li{break-inside:avoid;padding:1px 0}.meanings b{color:var(--ink);font-weight:600}
.sheet{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:24px 20px;margin-top:16px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:16px;margin:16px 0 0}
.card{border:1px solid var(--line);border-radius:10px;padding:14px;min-width:0;break-inside:avoid;
display:flex;flex-direction:column}
.pair{display:grid;grid-template-columns:1fr 18px 1fr;gap:6px;align-items:start}
.pair .arrow{color:var(--soft);text-align:center;padding-top:30px}
.card .count{font-size:13.5px;color:var(--soft);margin-top:auto;padding-top:10px}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-size:13.5px;line-height:1.4;margin-top:7px;overflow-wrap:anywhere}
figcaption b{display:block;color:var(--ink);font-weight:600}
.clip{display:-webkit-box;-webkit-line-clamp:3;-webkit-box-orient:vertical;overflow:hidden}
.picture{display:flex;align-items:center;justify-content:center;background:#fff;border:1px solid var(--line);
border-radius:8px;height:112px;overflow:hidden;color:#6d7580;font-size:12.5px}
.picture img{max-width:100%;width:104px;height:104px;object-fit:contain;display:block}
.pair .picture,.query .picture{height:84px}.pair .picture img,.query .picture img{width:76px;height:76px}
figcaption b.right{color:var(--accent)}
.asked{font-size:14.5px;font-weight:600;line-height:1.4;margin:0 0 10px;overflow-wrap:anywhere}
.recalls{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:8px 56px;margin-top:14px}
.recalls h4{font-size:13px;font-weight:500;color:var(--soft);margin:0 0 6px}
.recall{display:grid;grid-template-columns:minmax(0,13em) 1fr 3.2em;gap:10px;align-items:center;font-size:13.5px;
line-height:1.75;break-inside:avoid}
.recall>bdi{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.recall>span:last-child{color:var(--soft);text-align:right;white-space:nowrap}
.rail{background:var(--panel);border-radius:2px;height:9px;position:relative}
.rail i,.rail s{display:block;position:absolute;border-radius:2px}
.rail u{position:absolute;top:-2px;width:2px;height:13px;background:var(--ink);opacity:.6}
.recall.wide{grid-template-columns:minmax(0,11em) 1fr 7.2em}
.rail i{height:100%;background:var(--accent);left:0}.rail s{height:1px;top:4px;background:var(--ink);opacity:.6}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:24px 56px;align-items:start}
.figure{display:block;width:100%;height:auto;margin-top:14px}
.figure text{font-size:12px;fill:var(--soft);text-anchor:middle}
.figure text.start{text-anchor:start}.figure text.end{text-anchor:end}.figure text.count{fill:var(--ink)}
.bar{fill:var(--pale)}.bar.strong{fill:var(--accent)}
.axis{stroke:var(--other)}.grid{stroke:var(--line)}.frame{fill:none;stroke:var(--line)}
.diagonal{stroke:var(--other);stroke-dasharray:4 4}
.curve{fill:none;stroke-width:1.25;opacity:.5}.curve.c0{stroke:var(--accent)}.curve.c1{stroke:var(--other)}
.draw{fill:var(--accent);opacity:.35}
.whisker{stroke:var(--accent);opacity:.45}
.dot.c0{fill:var(--accent)}.dot.c1{fill:var(--paper);stroke:var(--other);stroke-width:1.5}
.bin.c0{fill:var(--accent)}.bin.c1{fill:var(--other)}
.query{display:grid;grid-template-columns:84px 1fr;gap:14px;align-items:start}
.query p{font-size:13.5px;margin:0 0 5px;line-height:1.4;overflow-wrap:anywhere}
.query p small{display:block;font-size:12.5px}
details{border:1px solid var(--line);border-radius:10px;padding:11px 16px;margin-top:10px}
details .results{margin-top:6px}summary{cursor:pointer}summary small{margin-left:8px;font-size:13.5px}
details dl{margin:12px 0 4px;font-size:14px}details dt{color:var(--ink);font-size:14px;font-weight:600;margin-top:10px}
details dd{color:var(--soft)}
footer{margin-top:72px;padding-top:20px;border-top:1px solid var(--line);font-size:13.5px;color:var(--soft)}
@media screen and (max-width:860px){.sheet{grid-template-columns:repeat(4,minmax(0,1fr))}}
@media screen and (max-width:640px){main{padding:32px 18px 48px}h1{font-size:27px}section{margin-top:52px;padding-top:28px}
.meanings{columns:1}dl.facts{gap:12px 32px}.sheet{grid-template-columns:repeat(3,minmax(0,1fr));gap:18px 12px}
.recall{grid-template-columns:minmax(0,8.5em) 1fr 3.2em}
.results thead{display:none}.results,.results tbody{display:block}
.results tr{display:flex;flex-wrap:wrap;gap:2px 20px;padding:12px 0;border-bottom:1px solid var(--line)}
.results tr.same{border-bottom-color:transparent}.results td{padding:0;border:0}.results td:empty{display:none}
.results td.name{flex:0 0 100%}.results td.rule{order:1;flex:1 1 40%}.results td.size{order:2}
.results td[data-title=classes]{display:none}.results td.metric{order:3;flex:0 0 42%;margin-top:4px}
.results td.metric:before,.results td.size:before{content:attr(data-title) " ";font-size:13px;color:var(--soft)}}
@media print{main{max-width:none;padding:0}section{break-before:page;border:0;padding:0;margin:0}nav{display:none}
h3{break-after:avoid}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}.scroll{overflow:visible}body{font-size:12.5px}}
""".strip()


def escape(text: object) -> str:
    """Make any text safe between tags and inside quotes; what UTF-8 or HTML cannot hold becomes a question mark."""
    plain = str(text).encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join("?" if is_control(letter) else letter for letter in plain), quote=True)


def is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" and letter not in "\n\t"


def name(text: object) -> str:
    """A name from the data, kept from turning the direction of the words around it."""
    return f"<bdi>{escape(text)}</bdi>"


def breakable(text: str) -> str:
    """A long name that may be broken after _, / and -."""
    pieces = re.split("(?<=[_/-])", text)
    return f"<bdi>{'<wbr>'.join(escape(piece) for piece in pieces)}</bdi>"


def page(title: str, body: str) -> str:
    """A whole document, with everything it needs inside."""
    return ("<!DOCTYPE html>\n"
            '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
            f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def picture(thumbnails: "Mapping[str, Image.Image]", key: str | None, alt: str) -> str:
    """A picture in its frame, or a note that there is none."""
    image = thumbnails.get(key) if key is not None else None
    if image is None:
        return '<div class="picture">no picture</div>'
    return f'<div class="picture"><img src="{data_uri(image)}" alt="{escape(alt)}"></div>'


def data_uri(image: Image.Image) -> str:
    """Shrink a picture to THUMBNAIL_SIZE and write it as a data URI, as PNG or JPEG, whichever is shorter."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    written = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": JPEG_QUALITY})):
        file = io.BytesIO()
        small.save(file, kind, **options)
        written.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(written)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of (term, its value as HTML); empty values are left out."""
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{value}</dd></div>" for term, value in pairs if value)
    return f'<dl class="facts">{items}</dl>'


def percent(fraction: float) -> str:
    return "\u2013" if math.isnan(fraction) else f"{fraction:.1%}"


def counted(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"
