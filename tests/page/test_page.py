"""The page in a real browser, on the real three services with the embedded model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, expect

from benchmarks.stack import Stack, running_stack
from gateway.api_keys import digest_of
from tests.cli.running import eventually
from tests.page.browser import WAIT_MS, Tab, running_browser

ANNA, WHERE = "My sister Anna lives in Rome.", "Where does Anna live?"
KEY = "ca-a-key-of-the-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def stack(browser: Browser) -> Iterator[Stack]:
    with running_stack("embedded", dtype="float32", dram="64MiB", ssd="256MiB", chunk_tokens=32) as running:
        yield running


@pytest.fixture
def open_tab(browser: Browser, stack: Stack) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def make(url: str = stack.url, **options: object) -> Tab:
        tabs.append(Tab(browser, url, **options))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.close()


@pytest.fixture
def tab(open_tab: Callable[..., Tab]) -> Tab:
    return open_tab()


def titles(tab: Tab) -> list[str]:
    found: list[str] = tab.page.locator(".entry .title").all_inner_texts()
    return found


def choose(tab: Tab, item: str) -> None:
    """Of the menu of the conversation that is shown."""
    tab.page.locator(".entry.chosen").get_by_role("button").last.click()
    tab.page.locator(".q-menu").get_by_text(item, exact=True).click()


def test_an_answer_streams_and_the_next_turn_shows_what_was_cached(tab: Tab, stack: Stack) -> None:
    """Bars, TTFT with and without the cache, the fill of all tiers, rates; and nothing is asked of any other host."""
    tab.page.evaluate(
        """() => { window.seen = new Set();
        new MutationObserver(() => { const now = document.querySelector('.coming');
          if (now && now.innerText.trim()) seen.add(now.innerText.trim()); })
        .observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
    )
    assert "Rome" in tab.say(ANNA)
    assert "Oslo" not in tab.say(WHERE)
    assert "Rome" in tab.answers.last.inner_text()
    bars = tab.page.locator(".turn")
    expect(bars).to_have_count(2)
    assert int(tab.page.locator("[data-turn='1']").get_attribute("data-cached")) == 0
    assert int(tab.page.locator("[data-turn='2']").get_attribute("data-cached")) > 20
    expect(tab.page.locator("[data-turn='2'] .src-hbm")).to_be_visible()
    expect(tab.page.locator("[data-turn='2'] .estimate")).to_contain_text("(estimate)")
    expect(tab.page.locator("[data-turn='1'] .estimate")).to_have_count(0)
    device = tab.page.locator("[data-tier='hbm']")
    expect(device).to_contain_text("retained")
    expect(device.locator(".retained")).to_be_visible()  # what the two turns have left there
    expect(tab.page.locator("[data-tier='dram']")).to_contain_text("of 64 MiB")
    expect(tab.page.get_by_text("of prompt tokens")).to_be_visible(timeout=WAIT_MS)
    expect(tab.page.get_by_text("looks ahead")).to_be_visible()
    assert tab.page.evaluate("seen.size") > 1, "the answer came all at once"
    own = re.compile(rf"(http|ws)://127\.0\.0\.1:{stack.ports['gateway']}/")
    assert [url for url in tab.requests if not own.match(url) and not url.startswith("data:")] == []
    assert any(url.startswith("ws:") for url in tab.requests)
    assert not [path for path in stack.http.get("/openapi.json").json()["paths"] if path == "/" or "nicegui" in path]


def test_conversations_are_renamed_forked_and_deleted(tab: Tab) -> None:
    tab.say(ANNA)
    choose(tab, "Rename")
    field = tab.page.get_by_role("textbox", name="Rename")
    field.fill("Family")
    field.press("Enter")
    expect(tab.page.locator(".entry.chosen .title")).to_have_text("Family")
    choose(tab, "Fork")
    expect(tab.page.locator(".entry .title", has_text="Family")).to_have_count(2)
    assert "Rome" in tab.say(WHERE)
    expect(tab.page.locator(".turn")).to_have_count(2)
    choose(tab, "Delete")
    tab.button("Delete").click()
    expect(tab.page.locator(".entry .title", has_text="Family")).to_have_count(1)
    expect(tab.page.locator(".greeting")).to_be_visible()


def test_edited_and_regenerated_turns_are_branches(tab: Tab) -> None:
    """Both stay, and a reload shows the newest."""
    tab.say("My brother Tom lives in Paris.")
    tab.say("Where does Tom live?")
    tab.button("Edit").last.click()
    field = tab.page.get_by_role("textbox", name="Edit your message")
    field.fill("Who is Tom?")
    tab.page.locator(".q-dialog").get_by_role("button", name="Send").click()
    expect(tab.page.get_by_text("2/2")).to_be_visible(timeout=WAIT_MS)
    expect(tab.answers.last).to_contain_text("brother")
    tab.button("Earlier version").click()
    expect(tab.answers.last).to_contain_text("Paris")
    tab.button("Regenerate").first.click()
    expect(tab.page.locator(".turn")).to_have_count(1, timeout=WAIT_MS)
    expect(tab.page.get_by_text("2/2")).to_be_visible()
    tab.page.reload()
    expect(tab.page.get_by_text("2/2")).to_be_visible()
    tab.button("Earlier version").click()
    expect(tab.page.locator(".turn")).to_have_count(2)


def test_typing_tells_the_store(tab: Tab, stack: Stack) -> None:
    """What was said is fetched before the turn comes."""
    name = 'cachedattention_rpc_seconds_count{method="Anticipate"}'
    tab.say(ANNA)
    before = stack.metrics("kvdaemon").get(name, 0.0)
    tab.message.press_sequentially("W")
    eventually(lambda: stack.metrics("kvdaemon").get(name, 0.0) > before, "the hint")


def test_everything_is_reached_by_keyboard_alone(tab: Tab) -> None:
    keys = tab.page.keyboard
    expect(tab.message).to_be_focused()
    keys.type(ANNA)
    keys.press("Shift+Enter")
    keys.type("She is a nurse.")
    keys.press("Enter")
    expect(tab.answers).to_have_count(1, timeout=WAIT_MS)
    expect(tab.page.locator(".question")).to_have_text(f"{ANNA}\nShe is a nurse.")
    expect(tab.message).to_be_focused()
    reached = set()
    for _ in range(60):
        keys.press("Tab")
        reached.add(
            tab.page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )
    assert {"Conversations", "Theme: auto", "Machine", "Edit", "Regenerate", "Fork from here", "Message"} <= reached
    tab.button("Edit").focus()
    keys.press("Enter")
    expect(tab.page.get_by_role("textbox", name="Edit your message")).to_be_focused()
    keys.press("Escape")
    expect(tab.page.locator(".q-dialog")).to_have_count(0)
    tab.page.locator(".entry.chosen").get_by_role("button").last.focus()
    keys.press("Enter")
    expect(tab.page.locator(".q-menu")).to_be_visible()


def test_light_and_dark(open_tab: Callable[..., Tab]) -> None:
    """The system's choice, until somebody makes one; that is kept."""
    ground = "getComputedStyle(document.body).backgroundColor"
    dark, light = "rgb(22, 25, 28)", "rgb(251, 250, 248)"
    tab = open_tab(color_scheme="dark")
    expect(tab.message).to_be_visible()
    assert tab.page.evaluate(ground) == dark
    tab.page.emulate_media(color_scheme="light")
    tab.page.wait_for_function(f"{ground} == '{light}'")
    tab.button("Theme: auto").click()
    tab.button("Theme: light").click()
    tab.page.wait_for_function(f"{ground} == '{dark}'")
    tab.page.reload()
    expect(tab.button("Theme: dark")).to_be_visible()
    assert tab.page.evaluate(ground) == dark


def test_a_phone(open_tab: Callable[..., Tab]) -> None:
    """Nothing is wider than the screen, and both panels open over the chat."""
    tab = open_tab(viewport={"width": 390, "height": 844}, has_touch=True)
    tab.say(ANNA)
    tab.message.fill("x" * 300)  # of which the model makes a long answer
    tab.message.press("Enter")
    tab.button("Stop").click()
    expect(tab.page.get_by_text("Stopped.")).to_be_visible()
    expect(tab.page.locator(".list")).not_to_be_in_viewport()
    wide = "document.documentElement.scrollWidth"
    assert tab.page.evaluate(wide) <= 390
    tab.button("Machine").click()
    expect(tab.page.locator(".turn")).to_be_in_viewport()
    assert tab.page.evaluate(wide) <= 390
    tab.page.mouse.click(5, 400)
    tab.button("Conversations").click()
    expect(tab.button("New conversation")).to_be_in_viewport()
    assert tab.page.evaluate(wide) <= 390


def test_text_of_others_is_text(tab: Tab) -> None:
    """Markup in a question, and in a title, is shown."""
    tab.say("<img src=x onerror=\"document.title='taken'\"> <b>bold</b>")
    expect(tab.page.locator(".question")).to_contain_text("<b>bold</b>")
    expect(tab.page.locator(".chat img")).to_have_count(0)
    assert tab.page.title() == "CachedAttention"


def test_a_key_opens_the_page_and_shows_its_tenant_alone(stack: Stack, open_tab: Callable[..., Tab]) -> None:
    """One that is taken out closes it. A gateway with open pages stops in time, and one without a page has none."""
    first = open_tab()
    first.say("Nobody else may read this.")
    first.is_orphan = True
    keys = stack.home / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "ann"\nsha256 = "{digest_of(KEY)}"\n')
    assert stack.restart("gateway", api_keys=keys) == 0
    tab = open_tab()
    field = tab.page.get_by_label("API key")
    field.fill("ca-another")
    field.press("Enter")
    expect(tab.page.get_by_text("this API key is not known here")).to_be_visible()
    assert tab.page.locator(".chat").count() == 0
    field.fill(KEY)
    field.press("Enter")
    expect(tab.message).to_be_visible()
    expect(tab.page.get_by_text("No conversations yet")).to_be_visible()
    assert titles(tab) == []
    assert "Rome" in tab.say(ANNA)
    tab.page.reload()
    expect(tab.answers).to_have_count(1)
    keys.write_text(f'[[keys]]\nname = "ann"\nsha256 = "{digest_of("another")}"\n')
    expect(tab.page.get_by_label("API key")).to_be_visible(timeout=WAIT_MS)
    tab.is_orphan = True
    assert stack.restart("gateway", no_page=True) == 0
    assert stack.http.get("/").status_code == 404
