"""Turns from arrival to their end: journaled, queued, run at inference, run again where inference dies, journaled.

Every turn is a task of its own, which never waits for its client. It always ends in exactly one way: done, failed
or cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from gateway.conversation import answer_key
from gateway.dispatch import Dispatcher, Place
from gateway.journal.journal import Ending, Journal, JournalUnavailable, NewTurn
from gateway.limits import Meters
from gateway.returns import Returns
from gateway.turn import Finished, Turn, TurnRequest
from gateway.workers import Workers
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.logs import get_logger
from protocol.errors import (
    CachedAttentionError,
    Cancelled,
    CapacityError,
    InternalError,
    PeerProtocolError,
    PeerUnavailable,
)
from protocol.ids import tenant_namespace
from protocol.messages import ChatMessage, TurnDelta, TurnDone, TurnStarted, TurnUsage

log = get_logger(__name__)

MAX_ATTEMPTS = 3
_CHARACTERS_PER_TOKEN = 4  # of English, about; only used to compare turns and to meter them beforehand
_REMEMBERED = 1024  # turns that are done
_AFTER_ABORT_S = 5.0  # for an aborted turn to reach its journal entry


@dataclass(frozen=True)
class Account:
    """What a turn that is done took, for the page. ended_s: wall clock; prefill_s: admission to first token."""

    tenant: bytes
    ended_s: float
    usage: TurnUsage
    ttft_s: float
    prefill_s: float


class ShuttingDown(CapacityError):
    code = "shutting_down"


class Turns:
    """Starts turns and brings each to its end. Owned by one loop."""

    def __init__(
        self,
        journal: Journal,
        dispatcher: Dispatcher,
        workers: Workers,
        metrics: GatewayMetrics,
        timeout_s: float,
        returns: Returns,
    ) -> None:
        """timeout_s: from a turn's arrival to its last token."""
        self._returns = returns
        self._journal = journal
        self._dispatcher = dispatcher
        self._workers = workers
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._turns: set[Turn] = set()
        self._accepting = True
        self.meters = Meters()
        self.recent: deque[Account] = deque(maxlen=_REMEMBERED)  # oldest first, of all tenants
        self.is_drained = False  # by an admin: no new turns, until told otherwise

    @property
    def is_accepting(self) -> bool:
        return self._accepting and not self.is_drained

    def __iter__(self) -> Iterator[Turn]:
        """Those at hand."""
        return iter(tuple(self._turns))

    def start(self, request: TurnRequest) -> Turn:
        """Begin a turn. Whatever comes of it is told by its events.

        Raises ShuttingDown, RateLimited, QueueFull, or PeerUnavailable: the model is not known yet. Then nothing was
        changed.
        """
        if not self._accepting:
            raise ShuttingDown("the server is shutting down")
        if self.is_drained:
            raise ShuttingDown("the server takes no new turns for now")
        turn = Turn(request, self._workers.model)
        tenant = request.tenant
        meter = self.meters.of(tenant.id, tenant.limits, time.monotonic(), tenant.name)
        if meter.limits != tenant.limits:  # the file of keys was changed
            meter.limit(tenant.limits, time.monotonic())
        foreseen = estimate_tokens(request.messages)
        meter.admit(foreseen, time.monotonic())
        try:
            self._dispatcher.enter(turn.id, request.tenant.id, request.priority)
        except CapacityError:
            meter.take_back(foreseen, time.monotonic())
            raise
        turn.save = meter.may_store
        if tenant.limits.stored_bytes is not None:
            meter.uses(tenant_namespace(turn.model.namespace, tenant.salt))
        if request.affinity is not None:
            self._returns.arrived(request.affinity)
        self._turns.add(turn)
        turn.task = asyncio.create_task(self._run(turn))
        turn.task.add_done_callback(lambda task: self._over(turn, task))
        return turn

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Accept no turn, drop those that wait, let those that run end for limit_s or until `hurry`, abort the rest."""
        self._accepting = False
        self._abort([turn for turn in self._turns if not turn.is_running])
        if running := self._tasks():
            waits: set[asyncio.Future[Any]] = {
                asyncio.create_task(hurry.wait()),
                asyncio.create_task(asyncio.wait(running)),
            }
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        self._abort(list(self._turns))
        if left := self._tasks():
            await asyncio.wait(left, timeout=_AFTER_ABORT_S)

    # -- one turn -----------------------------------------------------------------------------------------

    async def _run(self, turn: Turn) -> None:
        begun = False
        try:
            # From the request's arrival, the time in which its body came included.
            async with asyncio.timeout(turn.request.arrived_s + self._timeout_s - time.monotonic()):
                found = await self._journal.begin(_new_turn(turn))
                begun = True
                turn.parent, turn.conversation_id, turn.new_messages = (
                    found.parent,
                    found.conversation_id,
                    found.messages,
                )
                if found.is_new:
                    self._metrics.conversations.inc()
                done = await self._answer(turn)
            tail = turn.settle(done, time.monotonic())
            await self._journal.finish(turn.id, _done_ending(turn, done))
        except (Exception, asyncio.CancelledError) as error:
            turn.give_up()
            reason = self._reason(turn, error)
            await self._record_failure(turn, reason, begun)
            turn.fail(reason)
        else:
            assert turn.first_token_s is not None
            logprobs = tuple(turn.logprobs[: done.settled])
            ttft_s = turn.first_token_s - turn.request.arrived_s
            turn.finish(Finished(done, tail, ttft_s, logprobs, int(time.time())))
            self._observe(turn, done)

    async def _answer(self, turn: Turn) -> TurnDone:
        """The answer, by as many attempts as it takes. Raises what ended the last one."""
        while True:
            asked_s = time.monotonic()
            parent_key, affinity = turn.parent_turn_key, turn.request.affinity
            async with self._dispatcher.slot(turn.id, parent_key, _new_tokens(turn), affinity) as place:
                worker = place.worker
                turn.is_running = True
                turn.worker = worker.name
                turn.span.record("queue", asked_s, time.monotonic())
                try:
                    done = await self._attempt(turn, place)
                    self._workers.note_end(done.turn_key, worker, affinity)
                    self._returns.ended(parent_key, done.turn_key, affinity, turn.request.keep)
                    self._dispatcher.charge(turn.id, done.usage.completion_tokens)
                    return done
                except (PeerUnavailable, Cancelled) as error:
                    # The process died, or was told to stop: our own wish to cancel comes as CancelledError.
                    if turn.attempts >= MAX_ATTEMPTS or not self._accepting:
                        raise PeerUnavailable(f"inference went away during the turn: {error}") from error
                    log.warning(
                        "turn interrupted",
                        turn=turn.id.hex(),
                        worker=worker.name,
                        attempt=turn.attempts,
                        error=str(error),
                    )
                    self._metrics.observe_retry()
                    worker.gave_up_turn()
                finally:
                    turn.is_running = False

    async def _attempt(self, turn: Turn, place: Place) -> TurnDone:
        if place.worker.model.namespace != turn.model.namespace:
            # Its turn keys, and maybe its answer so far, belong to another model.
            raise CapacityError("another model was loaded while the turn waited; send it again")
        if turn.dispatched_s is None:
            turn.dispatched_s = time.monotonic()
        # The task's own deadline is the one that counts; this one, a little later, is for inference to know.
        timeout_s = turn.request.arrived_s + self._timeout_s - time.monotonic() + 1.0
        span = turn.span.child("dispatch", time.monotonic())
        attempt = turn.attempt(place.order, place.save_wait_s, span.traceparent)
        outcome = "interrupted"
        try:
            async with aclosing(place.worker.run_turn(attempt, timeout_s)) as parts:
                async for part in parts:
                    if isinstance(part, TurnStarted):
                        turn.start(part)
                    elif isinstance(part, TurnDelta):
                        turn.extend(part, time.monotonic())
                    elif isinstance(part, TurnDone):
                        outcome = ""
                        return part
                    else:
                        break
        finally:
            span.end({"worker": place.worker.name, "attempt": turn.attempts}, error=outcome)
        raise PeerProtocolError("inference answered a turn with something else")

    # -- its end ------------------------------------------------------------------------------------------

    def _reason(self, turn: Turn, error: BaseException) -> CachedAttentionError:
        if isinstance(error, asyncio.CancelledError):
            return turn.aborted_by or Cancelled("the turn was cancelled")
        if isinstance(error, CachedAttentionError):
            if isinstance(error, InternalError):
                log.error("turn failed by a bug", turn=turn.id.hex(), error=error.message)
            return error
        if isinstance(error, TimeoutError):
            if not self._workers.is_connected:
                return PeerUnavailable(f"{self._workers.reason}; waited {self._timeout_s:g} s")
            return CapacityError(f"the turn was not done in {self._timeout_s:g} s")
        log.error("turn failed by a bug", turn=turn.id.hex(), exc_info=error)
        return InternalError("the gateway failed; see its log")

    async def _record_failure(self, turn: Turn, reason: CachedAttentionError, begun: bool) -> None:
        status: Literal["cancelled", "failed"] = "cancelled" if isinstance(reason, Cancelled) else "failed"
        ending = Ending(status, turn.text, turn.tokens, error_code=reason.code, error=reason.message)
        if begun:
            try:
                await self._journal.finish(turn.id, ending)
            except JournalUnavailable as error:  # it stays pending there, and is failed at the next start
                log.warning("turn's end is not journaled", turn=turn.id.hex(), error=error.message)
        else:
            self._journal.finish_later(turn.id, ending)
        self._metrics.observe_turn(status)
        self._metrics.observe_tenant(turn.request.tenant.name, status)
        turn.span.end({"turn": turn.id.hex(), "status": status}, error=reason.message)
        log.info("turn", status=status, error=reason.message, code=reason.code, **_account(turn))

    def _observe(self, turn: Turn, done: TurnDone) -> None:
        now, arrived, first = time.monotonic(), turn.request.arrived_s, turn.first_token_s
        assert first is not None
        assert turn.dispatched_s is not None
        usage, metrics = done.usage, self._metrics
        sources = {"hbm": usage.hbm, "dram": usage.dram, "ssd": usage.ssd, "computed": usage.computed}
        metrics.observe_turn("done")
        metrics.observe_prompt(sources, usage.missed)
        metrics.observe_completion(usage.completion_tokens)
        cached = usage.hbm + usage.dram + usage.ssd
        computed = usage.prompt_tokens - cached
        metrics.observe_tenant(turn.request.tenant.name, "done", cached, computed, usage.completion_tokens)
        metrics.queue_wait.observe(turn.dispatched_s - arrived)
        metrics.ttft.observe(first - arrived)
        metrics.prefill.observe(done.prefill_s)
        self.recent.append(Account(turn.request.tenant.id, time.time(), usage, first - arrived, done.prefill_s))
        if usage.completion_tokens > 1:
            metrics.tpot.observe((now - first) / (usage.completion_tokens - 1))
        turn.span.end(
            {
                "turn": turn.id.hex(),
                "status": "done",
                "gen_ai.request.model": turn.model.model,
                "gen_ai.response.finish_reasons": done.finish_reason,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                **{f"cachedattention.{source}_tokens": tokens for source, tokens in sources.items()},
                "cachedattention.missed_tokens": sum(usage.missed.values()),
            }
        )
        log.info(
            "turn",
            status="done",
            finish_reason=done.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            **sources,
            missed=usage.missed,
            completion_tokens=usage.completion_tokens,
            prefill_s=round(done.prefill_s, 4),
            load_s=round(done.load_s, 4),
            **_account(turn),
        )

    def _over(self, turn: Turn, task: asyncio.Task[None]) -> None:
        self._turns.discard(turn)
        self._dispatcher.leave(turn.id)
        self._settle(turn)
        if task.cancelled():  # before its first step
            turn.fail(turn.aborted_by or Cancelled("the turn was cancelled"))
        elif error := task.exception():
            log.error("turn task failed", turn=turn.id.hex(), exc_info=error)
            turn.fail(InternalError("the gateway failed; see its log"))

    def _settle(self, turn: Turn) -> None:
        now, tenant = time.monotonic(), turn.request.tenant
        prompt, cached, completion = turn.used_tokens()
        foreseen = estimate_tokens(turn.request.messages)
        self.meters.of(tenant.id, tenant.limits, now).settle(foreseen, prompt, cached, completion, now)

    def _abort(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            turn.abort(ShuttingDown("the server is shutting down"))

    def _tasks(self) -> set[asyncio.Task[None]]:
        return {turn.task for turn in self._turns if turn.task is not None}


def _account(turn: Turn) -> dict[str, Any]:
    """What a turn's log line says however it ended. Times that it did not come to are None."""
    arrived = turn.request.arrived_s

    def since_arrival(at_s: float | None) -> float | None:
        return None if at_s is None else round(at_s - arrived, 4)

    return {
        "turn": turn.id.hex(),
        "conversation": turn.conversation_id.hex(),
        **({"trace": turn.span.trace_id} if turn.span.trace_id else {}),
        **({"tenant": turn.request.tenant.name} if turn.request.tenant.name else {}),
        "model": turn.model.model,
        "worker": turn.worker,
        "attempts": turn.attempts,
        "queue_s": since_arrival(turn.dispatched_s),
        "ttft_s": since_arrival(turn.first_token_s),
        "duration_s": since_arrival(time.monotonic()),
    }


def _new_turn(turn: Turn) -> NewTurn:
    request = turn.request
    return NewTurn(
        turn.id,
        request.tenant.id,
        turn.model.model,
        turn.transcript,
        turn.content,
        turn.model.namespace,
        request.place,
        request.stored,
        request.response,
        request.preamble,
    )


def _new_tokens(turn: Turn) -> int:
    """About how many tokens of the prompt no earlier turn left behind."""
    if turn.parent is not None and turn.parent.turn_key not in turn.transcript.keys:  # a branch
        return max(0, estimate_tokens(turn.request.messages) - turn.parent.context_tokens)
    return estimate_tokens(turn.transcript.after(turn.parent.turn_key if turn.parent else None))


def estimate_tokens(messages: Sequence[ChatMessage]) -> int:
    return sum(len(message.content) for message in messages) // _CHARACTERS_PER_TOKEN


def _done_ending(turn: Turn, done: TurnDone) -> Ending:
    assert turn.first_token_s is not None
    return Ending(
        "done",
        done.text,
        done.tokens,
        turn_key=done.turn_key,
        finish_reason=done.finish_reason,
        usage=done.usage,
        content_key=answer_key(turn.content.request_key, done.text),
        ttft_s=turn.first_token_s - turn.request.arrived_s,
        prefill_s=done.prefill_s,
    )
