"""The page in front of the API: `/` and what it loads are NiceGUI's, everything else goes on.

NiceGUI takes most of a second to import, so it is imported at the first visit, on a thread. A gateway that nobody
visits has nothing of it.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.journal.conversations import Conversations
from gateway.page.machine import Machine
from gateway.retention import Retention
from gateway.tenants import Tenants
from gateway.turns import Turns
from gateway.workers import Workers

# Nothing from elsewhere, whatever an answer of the model says. Vue compiles templates, hence unsafe-eval.
_POLICY = "; ".join(
    (
        "default-src 'self' data:",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "frame-ancestors 'none'",
        "form-action 'none'",
        "base-uri 'none'",
    )
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class Parts:
    """What the page is made of. max_text_bytes: of one message."""

    turns: Turns
    conversations: Conversations
    retention: Retention
    workers: Workers
    tenants: Tenants
    machine: Machine
    max_text_bytes: int


class Page:
    """Owned by one loop. NiceGUI is one for the whole process, so at most one gateway of a process shows its page."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._site: ASGIApp | None = None
        self._opening = asyncio.Lock()
        self._running = AsyncExitStack()

    def before(self, api: ASGIApp) -> ASGIApp:
        """The application that answers for the page, and asks `api` for everything else."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in ("http", "websocket") or not _is_ours(scope["path"]):
                await api(scope, receive, send)
                return
            site = self._site or await self._open()

            async def guarded_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(_HEADERS)
                await send(message)

            await site(scope, receive, guarded_send)

        return app

    async def close(self) -> None:
        await self._running.aclose()
        self._site = None

    async def _open(self) -> ASGIApp:
        async with self._opening:
            if self._site is None:
                await asyncio.to_thread(__import__, "nicegui")
                from gateway.page.site import make_site

                site = make_site(self._parts)
                await self._running.enter_async_context(site.router.lifespan_context(site))
                self._site = site
            return self._site


def _is_ours(path: str) -> bool:
    return path == "/" or path.startswith(("/_nicegui/", "/_nicegui_ws/"))
