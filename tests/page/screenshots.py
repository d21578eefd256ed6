"""Pictures of the page, of a real conversation with the embedded model: `make screenshots`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from playwright.sync_api import expect

from benchmarks.stack import Stack, running_stack
from tests.page.browser import WAIT_MS, Tab, running_browser

_SAID = (
    "My sister Anna lives in Rome.",
    "Anna works as a nurse, and my door code is 48213.",
    "Where does Anna live?",
    "Actually, Anna moved to Oslo.",
)
_LAST = ("So, where does Anna live?", "Which code opens my door?")
_OTHERS = ("My brother Tom lives in Paris.", "My cat is called Mia.", "My car is parked in Elm Street.")
_CROWD = 5


def _ask(stack: Stack, *messages: dict[str, str], tokens: int) -> dict[str, str]:
    """As another tenant. Returns the answer."""
    body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": tokens}
    reply = stack.http.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer another"})
    answer: dict[str, str] = reply.raise_for_status().json()["choices"][0]["message"]
    return answer


def _warm_up(stack: Stack) -> None:
    """Estimates are as good as the measured rates: right after a start they rest on its first, slow steps."""
    for number in range(24):
        text = f"My friend number {number} lives in Rome. " * (1 + number % 8)
        _ask(stack, {"role": "user", "content": text}, tokens=2)


def _ask_much(stack: Stack) -> list[threading.Thread]:
    """Turns that wait behind one another for as long as they are looked at."""

    def ask(number: int) -> None:
        question = {"role": "user", "content": _OTHERS[number % len(_OTHERS)]}
        answer = _ask(stack, question, tokens=60)
        _ask(stack, question, answer, {"role": "user", "content": "x" * 300}, tokens=400)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(_CROWD)]
    for thread in threads:
        thread.start()
    return threads


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"dtype": "float32", "dram": "16MiB", "ssd": "64MiB", "chunk_tokens": 32, "load_or_compute": "load"}
    with running_browser() as browser, running_stack("embedded", max_running=1, **settings) as stack:
        _warm_up(stack)
        tab = Tab(browser, stack.url, viewport={"width": 1360, "height": 1060})
        for text in (*_OTHERS[:2], *_SAID):
            if text == _SAID[0] or text in _OTHERS:
                tab.button("New conversation").click()
                expect(tab.page.locator(".greeting")).to_be_visible()
            tab.say(text)
        # Of what follows, the first turn finds its history on SSD alone, or in DRAM if the hint of somebody typing was
        # quicker, and the next one on the device.
        stack.restart("inference")
        stack.drop_dram()
        stack.wait_metric("gateway", "cachedattention_inference_connected", 1.0)
        _warm_up(stack)
        for text in _LAST:
            tab.say(text)
        crowd = _ask_much(stack)
        expect(tab.page.locator(".waiting .src-dram, .waiting .src-ssd").first).to_be_visible(timeout=WAIT_MS)
        tab.page.screenshot(path=directory / "page-light.png")
        tab.page.emulate_media(color_scheme="dark")
        tab.page.screenshot(path=directory / "page-dark.png", animations="disabled")
        phone = Tab(browser, stack.url, viewport={"width": 390, "height": 844}, has_touch=True)
        phone.button("Conversations").click()
        phone.page.locator(".entry", has_text="Anna").get_by_role("button").first.click()
        expect(phone.answers).to_have_count(len(_SAID) + len(_LAST))
        phone.page.locator(".q-drawer__backdrop:visible").click(position={"x": 370, "y": 600})
        phone.page.wait_for_timeout(500)
        phone.page.screenshot(path=directory / "page-phone.png")
        for thread in crowd:
            thread.join()
        tab.close()
        phone.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
