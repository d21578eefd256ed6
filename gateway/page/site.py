"""The page as NiceGUI has it. Imported at the first visit; see mount.py."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from nicegui import ui

from gateway.page.mount import Parts
from gateway.page.view import View

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#3f6f8f"/>'
    '<path d="M7 11h18M7 16h12M7 21h6" stroke="#fff" stroke-width="3" stroke-linecap="round"/></svg>'
)


def make_site(parts: Parts) -> FastAPI:
    """To be started by its lifespan. NiceGUI is one for the process: the last site made is the one that is shown."""
    site = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @ui.page("/", title="CachedAttention")
    async def page() -> None:
        ui.add_css(_STYLE)
        await View(parts).open()

    ui.run_with(
        site,
        favicon=_ICON,
        dark=None,
        language="en-US",
        tailwind=False,
        show_welcome_message=False,
        storage_secret=None,
    )
    return site
