"""One turn: what was asked, how far its answer has come, and the events that its client takes at its own pace."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, replace

from gateway.conversation import Transcript, answer_key
from gateway.journal.journal import Parent
from gateway.tenants import Tenant
from protocol.errors import CachedAttentionError, Cancelled, InternalError, PeerProtocolError
from protocol.ids import conversation_root, new_id
from protocol.messages import (
    ChatMessage,
    ModelInfo,
    RunTurn,
    SampledLogprobs,
    Sampling,
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


@dataclass(frozen=True)
class Finished:
    """The answer is whole and in the journal. `tail` is what the deltas did not carry, often nothing.

    logprobs: of all tokens that made the text, where they were asked for.
    """

    done: TurnDone
    tail: TurnDelta
    ttft_s: float
    logprobs: tuple[SampledLogprobs, ...] = ()


Event = TurnStarted | TurnDelta | Finished


class Turn:
    """Owned by one loop. Turns (turns.py) drives it; the API calls next_event and cancel only."""

    def __init__(self, request: TurnRequest, model: ModelInfo) -> None:
        root = conversation_root(request.tenant.salt, model.namespace, model.template_digest)
        self.id = new_id()
        self.created_s = int(time.time())
        self.request = request
        self.model = model
        self.transcript = Transcript(root, request.messages)
        self.parent: Parent | None = None
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
        self.task: asyncio.Task[None] | None = None
        self.aborted_by: CachedAttentionError | None = None
        self._settled = False
        self._started = False
        self._events: asyncio.Queue[Event | CachedAttentionError] = asyncio.Queue()  # bounded by the answer's length

    async def next_event(self) -> Event:
        """TurnStarted, TurnDelta..., Finished. Raises the error that ended the turn. Nothing comes after either."""
        event = await self._events.get()
        if isinstance(event, CachedAttentionError):
            raise event
        return event

    def cancel(self) -> None:
        """The client is gone. At any time, any number of times; changes nothing for a turn that is over."""
        self.abort(Cancelled("the client went away"))

    def abort(self, error: CachedAttentionError) -> None:
        """End the turn with `error`, unless its answer is whole."""
        if self.aborted_by is None and not self._settled and self.task is not None:
            self.aborted_by = error
            self.task.cancel()

    def attempt(self, order: int, save_wait_s: float = 0.0) -> RunTurn:
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
            parent_turn_key=self.parent.turn_key if self.parent else None,
            parent_tokens=self.parent.context_tokens if self.parent else 0,
            parent_wait_ms=int(save_wait_s * 1e3),
            resume_tokens=self.tokens,
            return_prompt_tokens=self.request.return_prompt_tokens,
            order=order,
        )

    def start(self, started: TurnStarted) -> None:
        """Inference took the turn in; of several attempts the first one counts."""
        if not self._started:
            self._started = True
            self._events.put_nowait(started)

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
        self._events.put_nowait(delta)

    def _show(self, settled: int) -> tuple[SampledLogprobs, ...]:
        """The log probabilities of the first `settled` tokens, less those that were shown."""
        found = tuple(self.logprobs[self._shown : settled])
        self._shown += len(found)
        return found

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
        self._events.put_nowait(finished)

    def fail(self, error: CachedAttentionError) -> None:
        self._settled = True
        self._events.put_nowait(error)

    def _note_token(self, now_s: float) -> None:
        if not self._started:  # a client that streams would miss what came before its first byte
            raise PeerProtocolError("inference answered a turn before it said that it had started")
        if self.first_token_s is None:
            self.first_token_s = now_s
