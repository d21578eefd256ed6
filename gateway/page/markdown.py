"""A model's answer as HTML. What it wrote is text: raw HTML is shown, not done, and images, which load, are links."""

from __future__ import annotations

from markdown_it import MarkdownIt

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable("image")


def to_html(text: str) -> str:
    """markdown-it makes no links of schemes that run anything."""
    html: str = _MARKDOWN.render(text)
    return html
