"""One turn: what was asked, how far its answer has come, and the events that its client takes at its own pace."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from gateway.conversation import Transcript, answer_key, content_root
from gateway.journal.journal import Parent, Place
from gateway.tenants import Tenant
from monitoring import traces
from protocol.errors import CachedAttentionError, Cancelled, InternalError, PeerProtocolError
from protocol.ids import conversation_root, digest, new_id
from protocol.messages import (
    ChatMessage,
    ModelInfo,
    Prompt,
    RunTurn,
    SampledLogprobs,
    Sampling,
    Tools,
    TurnDelta,
    TurnDone,
    TurnStarted,
)


@dataclass(frozen=True)
class TurnRequest:
    """A request that was found good."""

    tenant: Tenant
    messages: tuple[ChatMessage, ...]
    sampling: Sampling
    streaming: bool
    arrived_s: float  # monotonic
    return_prompt_tokens: bool = False
    priority: int = 0  # lowest first
    affinity: bytes | None = None  # names turns that probably begin alike; see Workers.take
    tools: Tools | None = None
    prompt: Prompt | None = None  # instead of messages through the chat template
    keep: bool = False  # its context, for a day; see returns.py
    rejoin_s: float = 0.0  # how long the turn goes on without a client, who may come back for its answer
    truncation: Literal["auto", "disabled"] = "auto"
    # Of /v1/responses; see journal.NewTurn:
    place: Place | None = None
    stored: bool = True
    response: dict[str, Any] | None = None
    preamble: int = 0


@dataclass(frozen=True)
class Finished:
    """The answer is whole and in the journal. `tail` is what the deltas did not carry, often nothing.

    logprobs: of all tokens that made the text, where they were asked for.
    """

    done: TurnDone
    tail: TurnDelta
    ttft_s: float
    logprobs: tuple[SampledLogprobs, ...] = ()
    ended_s: int = 0  # wall clock


Event = TurnStarted | TurnDelta | Finished


class Listener:
    """One client's view of a turn, at its own pace. Owned by the turn's loop."""

    def __init__(self, turn: Turn) -> None:
        """Use Turn.listen."""
        self._turn = turn
        self._events: asyncio.Queue[Event | CachedAttentionError] = asyncio.Queue()  # bounded by the answer's length

    async def next_event(self) -> Event:
        """TurnStarted, TurnDelta..., Finished. Raises the error that ended the turn. Nothing comes after either."""
        event = await self._events.get()
        if isinstance(event, CachedAttentionError):
            raise event
        return event

    def leave(self) -> None:
        """The client is gone. At any time, any number of times; a turn that nobody listens to is cancelled."""
        self._turn.left(self)

    def put(self, event: Event | CachedAttentionError) -> None:
        self._events.put_nowait(event)


class Turn:
    """Owned by one loop. Turns (turns.py) drives it; the API calls next_event, listen and cancel only."""

    def __init__(self, request: TurnRequest, model: ModelInfo) -> None:
        root = conversation_root(request.tenant.salt, model.namespace, model.template_digest)
        content = content_root(request.tenant.id)
        if request.prompt is not None:
            root, content = (digest("raw prompt", each, request.prompt.tokens) for each in (root, content))
        self.id = new_id()
        self.created_s = int(time.time())
        self.request = request
        self.model = model
        self.transcript = Transcript(root, request.messages)
        self.content = Transcript(content, request.messages)
        self.conversation_id = b""  # of the journal, and
        self.new_messages = 0  # how many are in it; known before it starts
        self.parent: Parent | None = None
        self.save = True  # whether its KV is stored
        self.attempts = 0
        self.is_running = False  # holds a place at inference
        self.worker = ""  # at which it ran last
        self.dispatched_s: float | None = None  # first time; monotonic
        self.first_token_s: float | None = None
        self.text = ""  # of the answer so far
        self.tokens = b""
        self.logprobs: list[SampledLogprobs] = []  # of `tokens`, where they were asked for
        self._shown = 0  # so many of them have gone to the client
        # A seed of our own where the client gave none: an attempt draws as the one that it goes on after would have.
        self._sampling = request.sampling
        if self._sampling.seed is None:
            self._sampling = replace(self._sampling, seed=secrets.randbits(63))
        self.span = traces.begin("turn", traces.caller.get(), request.arrived_s)
        self.task: asyncio.Task[None] | None = None
        self.aborted_by: CachedAttentionError | None = None
        self._settled = False
        self._started: TurnStarted | None = None
        self._end: Finished | CachedAttentionError | None = None
        self._listeners: list[Listener] = []
        self.first_listener = self.listen()

    @property
    def has_failed(self) -> bool:
        return self.aborted_by is not None or isinstance(self._end, CachedAttentionError)

    def describe(self) -> dict[str, Any]:
        """For an admin: nothing of what was said."""
        return {
            "turn": self.id.hex(),
            "tenant": self.request.tenant.name or self.request.tenant.id.hex(),
            "priority": self.request.priority,
            "age_s": round(time.monotonic() - self.request.arrived_s, 3),
            "attempts": self.attempts,
            "worker": self.worker,
            "answer_tokens": len(self.tokens) // 4,
        }

    def used_tokens(self) -> tuple[int, int, int]:
        """Of the prompt, cached ones of it, and of the answer, as far as the turn came."""
        completion = len(self.tokens) // 4
        if isinstance(self._end, Finished):
            usage = self._end.done.usage
            return usage.prompt_tokens, usage.hbm + usage.dram + usage.ssd, usage.completion_tokens
        return (0 if self._started is None else self._started.prompt_tokens), 0, completion

    async def next_event(self) -> Event:
        """As Listener.next_event, for the client that asked first."""
        return await self.first_listener.next_event()

    def cancel(self) -> None:
        """The client that asked first is gone."""
        self.first_listener.leave()

    def listen(self) -> Listener:
        """One more client for the same answer, which gets at once what there is of it."""
        listener = Listener(self)
        self._listeners.append(listener)
        if self._started is not None:
            listener.put(self._started)
        if self.text or self.tokens:
            listener.put(TurnDelta(self.text, self.tokens, tuple(self.logprobs[: self._shown])))
        if isinstance(self._end, Finished):
            listener.put(replace(self._end, tail=TurnDelta("", b"")))
        elif self._end is not None:
            listener.put(self._end)
        return listener

    def left(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
            if self._listeners or self.task is None or self.task.done():
                return
            if self.request.rejoin_s:
                asyncio.get_running_loop().call_later(self.request.rejoin_s, self._cancel_if_alone)
            else:
                self._cancel_if_alone()

    def _cancel_if_alone(self) -> None:
        if not self._listeners:
            self.abort(Cancelled("the client went away"))

    def abort(self, error: CachedAttentionError) -> None:
        """End the turn with `error`, unless its answer is whole or it has failed already."""
        if self.aborted_by is None and not self._settled and self.task is not None:
            self.aborted_by = error
            self.task.cancel()

    @property
    def parent_turn_key(self) -> bytes | None:
        """Of the context that it begins with, where that can be used."""
        return self.parent.turn_key if self.parent and not self.parent.reason else None

    def attempt(self, order: int, save_wait_s: float = 0.0, trace: str = "") -> RunTurn:
        """The message for the next attempt. What the client has seen stays; what it has not is made anew.

        save_wait_s: as RunTurn.parent_wait_ms.
        A job id per attempt: after a broken connection inference may still be ending the one before.
        """
        self.attempts += 1
        if not self.request.streaming:
            self.text, self.tokens, self.logprobs, self._shown = "", b"", [], 0
        return RunTurn(
            job_id=new_id(),
            messages=self.request.messages,
            request_key=self.transcript.request_key,
            tenant_salt=self.request.tenant.salt,
            sampling=self._sampling,
            parent_turn_key=self.parent_turn_key,
            parent_tokens=self.parent.context_tokens if self.parent else 0,
            parent_reason=self.parent.reason if self.parent else "",
            parent_wait_ms=int(save_wait_s * 1e3),
            resume_tokens=self.tokens,
            return_prompt_tokens=self.request.return_prompt_tokens,
            order=order,
            truncation=self.request.truncation,
            tools=self.request.tools,
            prompt=self.request.prompt,
            save=self.save,
            trace=trace,
        )

    def start(self, started: TurnStarted) -> None:
        """Inference took the turn in; of several attempts the first one counts."""
        if self._started is None:
            self._started = started
            self._tell(started)

    def extend(self, delta: TurnDelta, now_s: float) -> None:
        """Log probabilities go to the client with the text of their tokens, not while a stop string may take it back.

        Raises PeerProtocolError: the turn was never taken in.
        """
        self._note_token(now_s)
        self.text += delta.text
        self.tokens += delta.tokens
        if delta.logprobs:
            self.logprobs += delta.logprobs
            delta = replace(delta, logprobs=self._show(delta.settled))
        self._tell(delta)

    def _tell(self, event: Event | CachedAttentionError) -> None:
        for listener in self._listeners:
            listener.put(event)

    def _show(self, settled: int) -> tuple[SampledLogprobs, ...]:
        """The log probabilities of the first `settled` tokens, less those that were shown."""
        found = tuple(self.logprobs[self._shown : settled])
        self._shown += len(found)
        return found

    def give_up(self) -> None:
        """The turn has failed; nothing can abort it from here on, so that its end gets into the journal."""
        self._settled = True

    def settle(self, done: TurnDone, now_s: float) -> TurnDelta:
        """Check the whole answer; nothing can abort the turn from here on. Returns what the deltas did not carry.

        Raises PeerProtocolError: it is not what was streamed. InternalError: a key or a sum of ours is wrong.
        """
        if not done.text.startswith(self.text) or not done.tokens.startswith(self.tokens):
            raise PeerProtocolError("inference ended a turn with another answer than it had streamed")
        if self._sampling.logprobs is not None and 4 * len(self.logprobs) != len(done.tokens):
            raise PeerProtocolError("inference ended a turn without all of its log probabilities")
        if done.turn_key != answer_key(self.transcript.request_key, done.text):
            raise InternalError("gateway and inference disagree about a turn key")
        usage = done.usage
        if usage.hbm + usage.dram + usage.ssd + usage.computed + sum(usage.missed.values()) != usage.prompt_tokens:
            raise InternalError(f"the sources of a prompt do not add up to its length: {usage}")
        self._note_token(now_s)
        self._settled = True
        tail = TurnDelta(done.text[len(self.text) :], done.tokens[len(self.tokens) :], self._show(done.settled))
        self.text, self.tokens = done.text, done.tokens
        return tail

    def finish(self, finished: Finished) -> None:
        self._end = finished
        self._tell(finished)

    def fail(self, error: CachedAttentionError) -> None:
        self._settled = True
        self._end = error
        self._tell(error)

    def _note_token(self, now_s: float) -> None:
        if self._started is None:  # a client that streams would miss what came before its first byte
            raise PeerProtocolError("inference answered a turn before it said that it had started")
        if self.first_token_s is None:
            self.first_token_s = now_s
