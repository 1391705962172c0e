"""The Markdown of verdicts as TensorBoard renders it: its HTML, cells and text."""

from __future__ import annotations

import re
import warnings

import numpy as np


def render(markdown: str) -> str:
    """Return the HTML that TensorBoard makes of Markdown."""
    with warnings.catch_warnings():
        # TensorBoard has a copy of html5lib, which uses deprecated functions.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.plugins.text.text_plugin import text_array_to_html
    html: str = text_array_to_html(np.array(markdown), enable_markdown=True)
    return html


def cells(html: str) -> list[str]:
    return re.findall(r"<t[dh]>(.*?)</t[dh]>", html)


def as_text(html: str) -> str:
    for entity, character in {"&lt;": "<", "&gt;": ">", "&amp;": "&"}.items():
        html = html.replace(entity, character)
    return re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), html)
