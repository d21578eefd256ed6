"""Turns from arrival to their end: journaled, queued, run at inference, run again where inference dies, journaled.

Every turn is a task of its own, which never waits for its client. It always ends in exactly one way: done, failed
or cancelled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Literal

from gateway.dispatch import Dispatcher, Place
from gateway.journal.journal import Ending, Journal, JournalUnavailable, NewTurn
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
from protocol.messages import TurnDelta, TurnDone, TurnStarted

log = get_logger(__name__)

MAX_ATTEMPTS = 3
_AFTER_ABORT_S = 5.0  # for an aborted turn to reach its journal entry


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
    ) -> None:
        """timeout_s: from a turn's arrival to its last token."""
        self._journal = journal
        self._dispatcher = dispatcher
        self._workers = workers
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._turns: set[Turn] = set()
        self._accepting = True

    @property
    def is_accepting(self) -> bool:
        return self._accepting

    def start(self, request: TurnRequest) -> Turn:
        """Begin a turn. Whatever comes of it is told by its events.

        Raises ShuttingDown, QueueFull, or PeerUnavailable: the model is not known yet. Then nothing was changed.
        """
        if not self._accepting:
            raise ShuttingDown("the server is shutting down")
        turn = Turn(request, self._workers.model)
        self._dispatcher.enter(turn.id)
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
                turn.parent = await self._journal.begin(_new_turn(turn))
                begun = True
                if turn.parent is None:
                    self._metrics.conversations.inc()
                done = await self._answer(turn)
            tail = turn.settle(done, time.monotonic())
            await self._journal.finish(turn.id, _done_ending(done))
        except (Exception, asyncio.CancelledError) as error:
            reason = self._reason(turn, error)
            await self._record_failure(turn, reason, begun)
            turn.fail(reason)
        else:
            assert turn.first_token_s is not None
            logprobs = tuple(turn.logprobs[: done.settled])
            turn.finish(Finished(done, tail, turn.first_token_s - turn.request.arrived_s, logprobs))
            self._observe(turn, done)

    async def _answer(self, turn: Turn) -> TurnDone:
        """The answer, by as many attempts as it takes. Raises what ended the last one."""
        while True:
            async with self._dispatcher.slot(turn.id, turn.parent.turn_key if turn.parent else None) as place:
                worker = place.worker
                turn.is_running = True
                turn.worker = worker.name
                try:
                    done = await self._attempt(turn, place)
                    self._workers.note_end(done.turn_key, worker)
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
        attempt = turn.attempt(place.order, place.save_wait_s)
        async with aclosing(place.worker.run_turn(attempt, timeout_s)) as parts:
            async for part in parts:
                if isinstance(part, TurnStarted):
                    turn.start(part)
                elif isinstance(part, TurnDelta):
                    turn.extend(part, time.monotonic())
                elif isinstance(part, TurnDone):
                    return part
                else:
                    break
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
        log.info(
            "turn",
            turn=turn.id.hex(),
            status=status,
            error=reason.message,
            code=reason.code,
            attempts=turn.attempts,
            duration_s=round(time.monotonic() - turn.request.arrived_s, 4),
        )

    def _observe(self, turn: Turn, done: TurnDone) -> None:
        now, arrived, first = time.monotonic(), turn.request.arrived_s, turn.first_token_s
        assert first is not None
        assert turn.dispatched_s is not None
        usage, metrics = done.usage, self._metrics
        sources = {"hbm": usage.hbm, "dram": usage.dram, "ssd": usage.ssd, "computed": usage.computed}
        metrics.observe_turn("done")
        metrics.observe_prompt(sources, usage.missed)
        metrics.observe_completion(usage.completion_tokens)
        metrics.queue_wait.observe(turn.dispatched_s - arrived)
        metrics.ttft.observe(first - arrived)
        metrics.prefill.observe(done.prefill_s)
        if usage.completion_tokens > 1:
            metrics.tpot.observe((now - first) / (usage.completion_tokens - 1))
        log.info(
            "turn",
            turn=turn.id.hex(),
            status="done",
            finish_reason=done.finish_reason,
            prompt_tokens=usage.prompt_tokens,
            **sources,
            missed=usage.missed,
            worker=turn.worker,
            completion_tokens=usage.completion_tokens,
            attempts=turn.attempts,
            ttft_s=round(first - arrived, 4),
            duration_s=round(now - arrived, 4),
        )

    def _over(self, turn: Turn, task: asyncio.Task[None]) -> None:
        self._turns.discard(turn)
        self._dispatcher.leave(turn.id)
        if task.cancelled():  # before its first step
            turn.fail(turn.aborted_by or Cancelled("the turn was cancelled"))
        elif error := task.exception():
            log.error("turn task failed", turn=turn.id.hex(), exc_info=error)
            turn.fail(InternalError("the gateway failed; see its log"))

    def _abort(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            turn.abort(ShuttingDown("the server is shutting down"))

    def _tasks(self) -> set[asyncio.Task[None]]:
        return {turn.task for turn in self._turns if turn.task is not None}


def _new_turn(turn: Turn) -> NewTurn:
    transcript = turn.transcript
    return NewTurn(
        turn.id,
        turn.request.tenant.id,
        turn.model.model,
        transcript.request_key,
        transcript.answer_keys,
        transcript.after,
    )


def _done_ending(done: TurnDone) -> Ending:
    return Ending(
        "done",
        done.text,
        done.tokens,
        turn_key=done.turn_key,
        finish_reason=done.finish_reason,
        usage=done.usage,
    )
