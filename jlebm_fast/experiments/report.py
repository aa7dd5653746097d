"""One HTML file that opens without a network: tables, figures inside it, and how they came about."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from .drawing import Drawing
from .tables import Table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       background: #fff; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, .facts { color: #555; font-size: .9rem; }
code { background: #f3f3f3; padding: .1rem .3rem; }
"""


def _table(table: Table) -> str:
    head, *body = table.rows

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "\n".join(row(cells, "td") for cells in body)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    return (
        f"<h2>{html.escape(table.title)}</h2><div class=scroll><table><thead>{row(head, 'th')}</thead>"
        f"<tbody>{lines}</tbody></table></div>{notes}"
    )


def _figure(drawing: Drawing) -> str:
    picture = base64.b64encode(drawing.path.read_bytes()).decode()
    caption = html.escape(drawing.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{picture}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def report_html(title: str, facts: Sequence[str], tables: Sequence[Table], drawings: Sequence[Drawing]) -> str:
    """The report as a whole.

    Example:
        >>> page = report_html("Title", ["a fact"], [Table("T", [["a"], ["1"]], [])], [])
        >>> "<td>1</td>" in page and "http" not in page
        True
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p class=facts>{html.escape(fact)}</p>" for fact in facts)]
    parts += [_table(table) for table in tables]
    if drawings:
        parts += ["<h2>Figures</h2>", *map(_figure, drawings)]
    body = "\n".join(parts)
    head = (
        f'<meta charset="utf-8"><title>{html.escape(title)}</title><meta name="viewport" content="width=device-width">'
    )
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
