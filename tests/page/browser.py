"""Debian's Chromium, driven by Playwright, on the page of a running gateway."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

WAIT_MS = 30_000


def binary() -> Path:
    """Where neither the machine nor .venv has it: fails in CI, and skips elsewhere."""
    fetched = Path(sys.executable).parents[1] / "browser" / "chromium"
    if fetched.exists():
        return fetched
    if found := shutil.which("chromium"):
        return Path(found)
    if os.environ.get("CI"):
        pytest.fail("no chromium: `make browser` fetches it")
    pytest.skip("no chromium: `make browser` fetches it")


@contextmanager
def running_browser() -> Iterator[Browser]:
    path = binary()
    with sync_playwright() as playwright:
        # Without a sandbox, which containers and root do not allow: it sees our own page only.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """The page in a context of its own. Notes what it asks for elsewhere, and what goes wrong in it."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1360, "height": 850}} | options))
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.is_orphan = False  # its gateway stops, which it complains of
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda socket: self.requests.append(socket.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: self._note(line.type, line.text))
        self.page.goto(url)

    def _note(self, kind: str, text: str) -> None:
        if kind == "error" and not self.is_orphan:
            self.problems.append(text)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def message(self) -> Any:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def answers(self) -> Any:
        return self.page.locator(".answer:not(.coming)")

    def say(self, text: str) -> str:
        """The whole answer."""
        before = self.answers.count()
        self.message.fill(text)
        self.message.press("Enter")
        expect(self.answers).to_have_count(before + 1, timeout=WAIT_MS)
        said: str = self.answers.last.inner_text()
        return said

    def close(self) -> None:
        self.context.close()
        assert not self.problems, self.problems
