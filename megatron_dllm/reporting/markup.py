"""Parts of a page that its sections share, as HTML."""

from __future__ import annotations

import base64
import html


def figure(image: bytes, caption: str, kind: str = "") -> str:
    """A PNG with a line below it; `kind` is a class of the style sheet."""
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img class="{kind}" alt="" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def paragraph(text: str) -> str:
    """A remark in small letters."""
    return f'<p class="small">{html.escape(text)}</p>'


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
