"""One open page: its conversation, its sidebar, and the picture of the machine beside them.

It asks the gateway's own services, as the API's routes do, and as the tenant of the key that was typed in. The key is
kept by the browser, for its tab (sessionStorage); there are no cookies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from nicegui import events, ui

from gateway.journal.conversations import Changes, History, NotFound, Summary
from gateway.journal.tables import Turn as JournaledTurn
from gateway.page import branches, figures
from gateway.page.markdown import to_html
from gateway.page.mount import Parts
from gateway.tenants import Tenant, Unauthorized
from gateway.turn import Finished, Turn, TurnRequest
from protocol.errors import CachedAttentionError, Cancelled
from protocol.messages import ChatMessage, Sampling, TurnDelta, TurnUsage

_GREEDY, _ANEW = 0.0, 1.0  # temperatures of an answer, and of one that is to be another
_DRAW_S = 0.06  # between two pictures of an answer that is coming
_TYPING_S = 5.0  # between two hints that somebody is typing; each is about the next so many seconds
_REFRESH_S = 1.0
_LISTED = 50
_REMEMBERED = "({key: sessionStorage.getItem('key'), at: sessionStorage.getItem('at'), theme: localStorage.theme})"
_THEMES = {"auto": None, "light": False, "dark": True}
_THEME_ICONS = {"auto": "brightness_auto", "light": "light_mode", "dark": "dark_mode"}
# Stays at the end of the chat while it grows, unless its reader has gone up.
_FOLLOW = """
let end = true;
const page = document.documentElement;
addEventListener('scroll', () => end = page.scrollHeight - page.scrollTop - page.clientHeight < 80, {passive: true});
new MutationObserver(() => end && scrollTo(0, page.scrollHeight))
  .observe(document.querySelector('.chat'), {childList: true, subtree: true, characterData: true});
"""
_ENTER_SENDS = "(e) => { if (!e.shiftKey && !e.isComposing) { e.preventDefault(); emit(e.target.value); } }"


class View:
    """Owned by the loop of the gateway. Everything of it goes when the browser's tab does."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._key = ""
        self._conversation: bytes | None = None  # None: a new one
        self._turns: Sequence[JournaledTurn] = ()
        self._path: list[JournaledTurn] = []  # the branch that is shown
        self._live: Turn | None = None  # whose answer is coming, in what is shown
        self._at_hand: set[Turn] = set()
        self._listed = _LISTED
        self._hinted_s = 0.0
        self._theme = "auto"

    async def open(self) -> None:
        client = ui.context.client
        client.on_delete(self._leave)
        self._dark = ui.dark_mode(None)
        ui.colors(primary="#3a6a8a")
        await client.connected()
        kept = await ui.run_javascript(f"return {_REMEMBERED}")
        self._theme = kept.get("theme") if kept.get("theme") in _THEMES else "auto"
        self._dark.value = _THEMES[self._theme]
        try:
            self._key = kept.get("key") or ""
            self._identify(self._key)
        except Unauthorized:
            self._ask_key()
            return
        await self._build(kept.get("at") or "")

    def _leave(self) -> None:
        for turn in self._at_hand:
            turn.abort(Cancelled("the page was closed"))

    # -- who is here ------------------------------------------------------------------------------------------

    def _identify(self, key: str) -> Tenant:
        return self._parts.tenants.identify(f"Bearer {key}" if key else None)

    @property
    def _tenant(self) -> Tenant:
        """Found anew each time: a key that was taken out opens nothing more. Raises Unauthorized."""
        return self._identify(self._key)

    def _ask_key(self) -> None:
        with ui.element("form").classes("login").on("submit.prevent", lambda: enter()):
            ui.html("CachedAttention", sanitize=False, tag="h1").classes("name")
            field = ui.input("API key", password=True).props("outlined autofocus autocomplete=off").classes("wide")
            ui.button("Open").props("unelevated no-caps type=submit")

        def enter() -> None:
            try:
                self._identify(field.value.strip())
            except Unauthorized as error:
                field.props["error"] = True
                field.props["error-message"] = error.message
                return
            ui.run_javascript(f"sessionStorage.setItem('key', {json.dumps(field.value.strip())}); location.reload()")

    # -- what is where -----------------------------------------------------------------------------------------

    async def _build(self, at: str) -> None:
        with ui.header().classes("top"):
            menu = _icon("menu", "Conversations")
            ui.label("CachedAttention").classes("name")
            ui.label().classes("model").bind_text_from(self._parts.workers, "reason", lambda _: self._served())
            ui.space()
            self._theme_button = _icon(_THEME_ICONS[self._theme], f"Theme: {self._theme}", self._change_theme)
            if self._tenant.name:
                _icon("logout", "Forget the key", self._forget_key)
            panel = _icon("insights", "Machine")
        with ui.left_drawer(bottom_corner=True).props("width=270 breakpoint=900").classes("side") as left:
            ui.button("New conversation", icon="add", on_click=self._begin_new, color=None).props(
                "flat no-caps align=left"
            ).classes("new")
            self._list = ui.element("nav").classes("list").props('aria-label="Conversations"')
        with ui.right_drawer(bottom_corner=True).props("width=350 breakpoint=1200").classes("machine") as right:
            self._figures = {}
            for name, title in (("turns", "This conversation"), ("queue", "Queue"), ("tiers", "Tiers")):
                self._figures[name] = _section(title)
            self._figures["time"] = _section("Over time")
        menu.on_click(left.toggle)
        panel.on_click(right.toggle)
        self._chat = ui.element("main").classes("chat").props('role=log aria-live=polite aria-label="Chat"')
        with ui.footer().classes("bottom"), ui.element("div").classes("composer"):
            self._input = (
                ui.textarea(placeholder="Say something", on_change=self._typing)
                .props('autogrow outlined dense autofocus aria-label="Message" input-style="max-height: 10rem"')
                .classes("wide")
                .on("keydown.enter", self._enter, js_handler=_ENTER_SENDS)
            )
            self._stop = _icon("stop", "Stop", self._stop_answer)
            self._send = _icon("arrow_upward", "Send", lambda: self._say(self._input.value))
        self._stop.visible = False
        ui.run_javascript(_FOLLOW)
        await self._list_conversations()
        await self._show(bytes.fromhex(at) if len(at) == 32 else None)
        ui.timer(_REFRESH_S, self._refresh)

    def _served(self) -> str:
        try:
            return self._parts.workers.model.model.rstrip("/").rsplit("/", 1)[-1]
        except CachedAttentionError:
            return "no model yet"

    def _change_theme(self) -> None:
        names = list(_THEMES)
        self._theme = names[(names.index(self._theme) + 1) % len(names)]
        self._dark.value = _THEMES[self._theme]
        self._theme_button.props(f'icon={_THEME_ICONS[self._theme]} aria-label="Theme: {self._theme}"')
        ui.run_javascript(f"localStorage.theme = '{self._theme}'")

    def _forget_key(self) -> None:
        ui.run_javascript("sessionStorage.clear(); location.reload()")

    # -- the sidebar -----------------------------------------------------------------------------------------------

    async def _list_conversations(self) -> None:
        found, more = await self._parts.conversations.list(self._tenant.id, self._listed)
        self._list.clear()
        with self._list:
            for summary in found:
                self._entry(summary)
            if more:
                ui.button("More", on_click=self._list_more, color=None).props("flat no-caps dense")
            if not found:
                ui.label("No conversations yet").classes("quiet")

    def _entry(self, summary: Summary) -> None:
        one = summary.conversation
        title = str(one.title or "Untitled")
        chosen = one.id == self._conversation
        with ui.element("div").classes("entry chosen" if chosen else "entry"):
            button = ui.element("button").classes("pick").on("click", lambda: self._show(one.id))
            button.props["aria-current"] = "true" if chosen else "false"
            with button:
                ui.label(title).classes("title")
                ui.label(
                    f"{summary.turns} {'turn' if summary.turns == 1 else 'turns'} · {summary.tokens:,} tokens"
                ).classes("quiet")
            with _icon("more_vert", f"More of {title}"), ui.menu():
                ui.menu_item("Rename", lambda: self._rename(one.id, title))
                ui.menu_item("Fork", lambda: self._fork(one.id, None))
                ui.menu_item("Delete", lambda: self._delete(one.id, title))

    async def _list_more(self) -> None:
        self._listed += _LISTED
        await self._list_conversations()

    async def _begin_new(self) -> None:
        await self._show(None)

    async def _rename(self, conversation_id: bytes, title: str) -> None:
        new = await _ask("Rename", title, "Rename")
        if new is not None and new.strip():
            await self._try(
                self._parts.conversations.change(self._tenant.id, conversation_id, Changes(title=new.strip()[:200]))
            )
            await self._list_conversations()

    async def _fork(self, conversation_id: bytes, turn_id: bytes | None) -> None:
        made = await self._try(self._parts.conversations.fork(self._tenant.id, conversation_id, turn_id, None))
        if made is not None:
            self._parts.retention.created()
            await self._show(made.conversation.id)
            ui.notify("A conversation of its own; its history is shared, not computed again", color="primary")

    async def _delete(self, conversation_id: bytes, title: str) -> None:
        if await _confirm(f"Delete “{title}”?", "Its messages go now; its cache goes when room is needed.", "Delete"):
            deleted = await self._try(self._parts.retention.delete(self._tenant.id, conversation_id))
            if deleted is not None and conversation_id == self._conversation:
                await self._show(None)
            await self._list_conversations()

    # -- the chat ------------------------------------------------------------------------------------------------------

    async def _show(self, conversation_id: bytes | None, last: JournaledTurn | None = None) -> None:
        """A conversation, up to `last` or to its newest turn."""
        self._live = None
        self._conversation = conversation_id
        self._hinted_s = 0.0
        await self._read(last)
        if conversation_id != self._conversation:  # another was chosen meanwhile
            return
        self._draw()
        ui.run_javascript(f"sessionStorage.setItem('at', '{(self._conversation or b'').hex()}')")
        self._input.run_method("focus")
        await self._list_conversations()

    async def _read(self, last: JournaledTurn | None = None) -> None:
        self._turns = ()
        if self._conversation is not None:
            try:
                self._turns = await self._parts.conversations.turns(self._tenant.id, self._conversation)
            except NotFound:
                self._conversation = None
        self._path = branches.path_to(self._turns, branches.newest_end(self._turns, last))

    def _draw(self) -> None:
        """What is shown, without an answer that is coming."""
        self._stop.visible, self._send.visible = False, True
        self._chat.clear()
        with self._chat:
            if not self._path and self._live is None:
                with ui.element("div").classes("empty"):
                    ui.label("What do you want to talk about?").classes("greeting")
                    ui.label("No token is computed twice; the panel shows where each turn’s came from.")
            for turn in self._path:
                self._draw_turn(turn)
        self._draw_bars()

    def _draw_turn(self, turn: JournaledTurn) -> None:
        idle = turn.status != "pending"
        with ui.element("div").classes("asked"):
            with ui.element("div").classes("acts mine"):
                self._draw_branches(turn)
                if idle and turn.messages:
                    _icon("edit", "Edit", lambda: self._edit(turn))
            ui.label(_said(turn)).classes("question")
        if turn.answer:
            with ui.element("div").classes("answer"):
                ui.html(to_html(str(turn.answer)), sanitize=True)
        if turn.status in ("failed", "cancelled"):
            ui.label("Stopped." if turn.status == "cancelled" else f"Failed: {turn.error}").classes("why")
        if idle and (turn.usage or turn.error_code):
            with ui.element("div").classes("acts"):
                _icon("refresh", "Regenerate", lambda: self._ask_again(turn, _messages(turn), _ANEW))
                if turn.status == "done":
                    _icon("call_split", "Fork from here", lambda: self._fork(turn.conversation_id, turn.id))
                if turn.usage and turn.ttft_s is not None:
                    usage = TurnUsage(**turn.usage)
                    ui.label(
                        f"{figures.cached(usage):,} of {usage.prompt_tokens:,} tokens cached"
                        f" · {figures.seconds(turn.ttft_s)}"
                    ).classes("quiet")

    def _draw_branches(self, turn: JournaledTurn) -> None:
        same = branches.siblings(self._turns, turn)
        if len(same) < 2:
            return
        at = same.index(turn)
        before = _icon("chevron_left", "Earlier version", lambda: self._show(self._conversation, same[at - 1]))
        before.set_enabled(at > 0)
        ui.label(f"{at + 1}/{len(same)}").classes("quiet")
        after = _icon("chevron_right", "Later version", lambda: self._show(self._conversation, same[at + 1]))
        after.set_enabled(at + 1 < len(same))

    def _draw_bars(self) -> None:
        told = [(turn, TurnUsage(**turn.usage)) for turn in self._path if turn.usage]
        longest = max((usage.prompt_tokens for _, usage in told), default=0)
        bars = [
            figures.turn(number, usage, turn.ttft_s, turn.prefill_s, longest)
            for number, (turn, usage) in enumerate(told, 1)
        ]
        nothing = '<div class="quiet">Each turn becomes a bar here: its prompt, by where it came from.</div>'
        self._figures["turns"].content = figures.legend() + ("".join(reversed(bars)) or nothing)

    async def _edit(self, turn: JournaledTurn) -> None:
        messages = _messages(turn)
        at = max((place for place, one in enumerate(messages) if one.role == "user"), default=None)
        if at is None:
            return
        text = await _ask("Edit your message", messages[at].content, "Send", long=True)
        if text is not None and text.strip():
            changed = [*messages[:at], replace(messages[at], content=text.strip()), *messages[at + 1 :]]
            await self._ask_again(turn, changed, _GREEDY)

    # -- a turn ------------------------------------------------------------------------------------------------------

    async def _enter(self, event: events.GenericEventArguments) -> None:
        await self._say(event.args)

    async def _say(self, text: Any) -> None:
        text = str(text or "").strip()
        if not text or self._live is not None:
            return
        ends = [turn for turn in self._path if turn.status == "done"]
        self._input.value = ""
        if not await self._ask(ends[-1] if ends else None, [ChatMessage("user", text)], _GREEDY):
            self._input.value = text

    async def _ask_again(self, turn: JournaledTurn, messages: Sequence[ChatMessage], temperature: float) -> None:
        if self._live is None:
            parent = next((other for other in self._turns if other.id == turn.parent_id), None)
            await self._ask(parent, messages, temperature)

    async def _ask(self, parent: JournaledTurn | None, new: Sequence[ChatMessage], temperature: float) -> bool:
        """Ask behind `parent` and show the answer as it comes. False: it was not even begun."""
        arrived_s = time.monotonic()
        tenant, parts = self._tenant, self._parts
        if sum(len(message.content.encode("utf-8", "replace")) for message in new) > parts.max_text_bytes:
            ui.notify(f"A message has at most {parts.max_text_bytes:,} bytes", type="warning")
            return False
        try:
            history = None
            if parent is not None:
                history = await parts.conversations.history_to(tenant.id, parent.id)
            elif self._conversation is not None:
                history = History(self._conversation, None, ())
            turn = parts.turns.start(
                TurnRequest(
                    tenant,
                    (*(history.messages if history else ()), *new),
                    Sampling(temperature=temperature),
                    streaming=True,
                    arrived_s=arrived_s,
                    priority=tenant.limits.usual_priority,
                    place=history.place(new, is_end=False) if history else None,
                )
            )
        except CachedAttentionError as error:
            ui.notify(error.message, type="negative")
            return False
        self._live = turn
        self._path = branches.path_to(self._turns, parent)
        self._draw()
        self._stop.visible, self._send.visible = True, False
        with self._chat:
            with ui.element("div").classes("asked"):
                ui.label("\n\n".join(message.content for message in new)).classes("question")
            with ui.element("div").classes("answer coming"):
                answer = ui.html("", sanitize=True)
        await self._follow(turn, answer)
        return True

    async def _follow(self, turn: Turn, answer: ui.html) -> None:
        text, drawn_s, failure = "", 0.0, ""
        self._at_hand.add(turn)
        try:
            event: Any = None
            while not isinstance(event, Finished):
                event = await turn.next_event()
                if isinstance(event, TurnDelta):
                    text += event.text
                    if self._live is turn and time.monotonic() - drawn_s > _DRAW_S:
                        answer.content = to_html(text)
                        drawn_s = time.monotonic()
        except CachedAttentionError as error:
            failure = "" if isinstance(error, Cancelled) else error.message
        finally:
            self._at_hand.discard(turn)
        if self._chat.is_deleted:
            return
        if self._live is turn:
            self._live = None
            self._conversation = turn.conversation_id or self._conversation
            await self._read()
            self._draw()
            at = (self._conversation or b"").hex()
            ui.run_javascript(f"sessionStorage.setItem('at', '{at}')")
        if failure:
            ui.notify(failure, type="negative")
        await self._list_conversations()
        await self._refresh()

    def _stop_answer(self) -> None:
        if self._live is not None:
            self._live.abort(Cancelled("stopped"))

    async def _typing(self, event: events.ValueChangeEventArguments[Any]) -> None:
        """Whoever types is about to ask: what was said is fetched before."""
        now = time.monotonic()
        if event.value and self._conversation is not None and now - self._hinted_s > _TYPING_S:
            self._hinted_s = now
            await self._try(self._parts.retention.anticipate(self._tenant.id, self._conversation, _TYPING_S))

    # -- the machine -------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        try:
            tenant = self._tenant.id
        except Unauthorized:
            self._forget_key()
            return
        picture = await self._parts.machine.look()
        self._figures["tiers"].content = figures.tiers(picture)
        self._figures["queue"].content = figures.queue(picture, tenant)
        self._figures["time"].content = figures.over_time(self._parts.machine.recent(tenant))

    async def _try(self, work: Awaitable[Any]) -> Any:
        """Its result; None, and a notice, where it failed."""
        try:
            return await work
        except CachedAttentionError as error:
            ui.notify(error.message, type="negative")
            return None


# -- pieces ------------------------------------------------------------------------------------------------------------


def _icon(icon: str, label: str, act: Callable[..., Any] | None = None) -> ui.button:
    button = ui.button(icon=icon, on_click=act, color=None).props("flat round dense size=sm").classes("icon")
    button.props["aria-label"] = button.props["title"] = label
    return button


def _section(title: str) -> ui.html:
    with ui.element("section"):
        ui.html(title, sanitize=False, tag="h2")
        return ui.html("", sanitize=False).classes("figure")  # ours; see figures.py


def _messages(turn: JournaledTurn) -> list[ChatMessage]:
    return [ChatMessage(**message) for message in turn.messages if message is not None]


def _said(turn: JournaledTurn) -> str:
    return "\n\n".join(message.content for message in _messages(turn))


async def _ask(title: str, text: str, verb: str, *, long: bool = False) -> str | None:
    """A text, changed; None: never mind."""
    with ui.dialog() as dialog, ui.card().classes("ask"):
        ui.label(title).classes("title")
        make = ui.textarea if long else ui.input
        field = make(value=text).props("outlined autofocus dense autogrow" if long else "outlined autofocus dense")
        field.classes("wide").props["aria-label"] = title
        if not long:
            field.on("keydown.enter", lambda: dialog.submit(field.value))
        with ui.row().classes("ends"):
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat no-caps")
            ui.button(verb, on_click=lambda: dialog.submit(field.value)).props("unelevated no-caps")
    answer: str | None = await dialog
    dialog.delete()
    return answer


async def _confirm(title: str, text: str, verb: str) -> bool:
    with ui.dialog() as dialog, ui.card().classes("ask"):
        ui.label(title).classes("title")
        ui.label(text)
        with ui.row().classes("ends"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat no-caps autofocus")
            ui.button(verb, on_click=lambda: dialog.submit(True)).props("unelevated no-caps color=negative")
    answer = bool(await dialog)
    dialog.delete()
    return answer
