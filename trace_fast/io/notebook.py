"""HTML of results and models, as Jupyter shows them where they are the last value of a cell."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trace_fast.io.visualize import encode_picture

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["format_html"]

HEIGHT = 192  # of pictures, in pixels


def format_html(title: str, facts: Mapping[str, Any], pictures: Mapping[str, Image.Image] = {}) -> str:
    """Return a table of facts below pictures, which are in the text itself.

    Args:
        title: above all.
        facts: values by their names; those that are None are left out.
        pictures: of any size, by their titles; they are resized to a height of 192 pixels.

    Example:
        >>> format_html("Detector", {"size": (96, 128)})
        '<b>Detector</b><table><tr><th>size</th><td>(96, 128)</td></tr></table>'
    """
    figures = []
    for name, picture in pictures.items():
        resized = picture.resize((max(1, round(picture.width * HEIGHT / picture.height)), HEIGHT))
        data = base64.b64encode(encode_picture(resized, "PNG")).decode()
        figures.append(
            f'<figure style="display: inline-block; margin: 4px"><img src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
        )
    rows = [
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    ]
    return f"<b>{html.escape(title)}</b>{''.join(figures)}<table>{''.join(rows)}</table>"
