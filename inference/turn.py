"""One turn in the inference process: plan its context, run it, save it. DESIGN.md section 3, steps 4 to 8."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from inference.context import (
    History,
    Known,
    Wanted,
    account,
    account_chunks,
    known_history,
    wanted_chunks,
    worth_taking,
)
from inference.engine import Job
from inference.guided import Guide, compile_schema
from inference.logprobs import Logprobs
from inference.preload import LoadFailed, LoadTask
from inference.sampling import Sampler
from inference.save import SaveTask
from inference.store import UNAVAILABLE, Lease
from inference.text import AnswerText, calls_tool, prompt_tokens, render
from inference.working_kv import OutOfKv, RetainedMatch, WorkingKv, new_context
from monitoring.logs import get_logger
from protocol import ids
from protocol.errors import CachedAttentionError, ContextLengthExceeded, InternalError, InvalidRequest
from protocol.ids import TokenArray
from protocol.messages import Acquire, Manifest, RunTurn, SampledLogprobs, TurnDelta, TurnDone, TurnStarted, TurnUsage
from protocol.rpc import Call

if TYPE_CHECKING:
    from inference.service import InferenceService

log = get_logger(__name__)

_LOAD_DEADLINE_S = 20.0
_SAVE_PREEMPTED_S = 5.0  # somebody waits for the memory; what is not saved by then is computed again
_LEASE_MS = 30_000  # longer than a load may take
# An answer's working KV begins with room for so many tokens and grows; reserving for the longest answer that a
# client allows would waste most of it.
_ANSWER_ROOM_TOKENS = 128


class ManifestCache:
    """Manifests of recent turns, so that a quick follow-up need not ask the daemon, nor have one."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._held: OrderedDict[bytes, Manifest] = OrderedDict()

    def get(self, turn_key: bytes) -> Manifest | None:
        found = self._held.get(turn_key)
        if found is not None:
            self._held.move_to_end(turn_key)
        return found

    def put(self, manifest: Manifest) -> None:
        old = self._held.pop(manifest.turn_key, None)
        if old is not None:
            self._used_bytes -= _size(old)
        self._held[manifest.turn_key] = manifest
        self._used_bytes += _size(manifest)
        while self._used_bytes > self._capacity_bytes and len(self._held) > 1:
            self._used_bytes -= _size(self._held.popitem(last=False)[1])


def _size(manifest: Manifest) -> int:
    return len(manifest.token_ids) + 4 * len(manifest.text) + 16 * len(manifest.chunk_ids) + 300


@dataclass(frozen=True)
class Plan:
    """A turn's prompt, what is known about its history, and what its answer must follow."""

    text: str
    prompt: TokenArray
    namespace: bytes
    known: Known
    parent: Manifest | None
    continues: bool  # the prompt begins with the parent's tokens
    guide: Guide | None  # at the answer's beginning


class Preempted:
    """Somebody earlier in the gateway's order needed the job's memory."""


@dataclass(frozen=True)
class Begun:
    """Working KV with the history in it or on its way."""

    kv: WorkingKv
    history: History
    lease: Lease | None
    miss_reason: str


class Turn:
    """Runs one RunTurn request. Belongs to the event loop; the listener methods are called by the engine's thread."""

    def __init__(self, service: InferenceService, call: Call, request: RunTurn) -> None:
        self._service = service
        self._call = call
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TurnDelta | Preempted | Exception | None] = asyncio.Queue()
        self._history, self._miss_reason = History(), ""
        self._failure_reason = ""
        self._load_failures = 0
        self._was_preempted = False
        self._set_aside: Manifest | None = None  # what a preemption saved

    # -- listener, on the engine's thread -----------------------------------------------------------------

    def on_token(self, job: Job, token: int, text: str, logprobs: SampledLogprobs | None) -> None:
        packed = ids.pack_tokens([token])
        if logprobs is None:
            self._tell(TurnDelta(text, packed))
        else:
            self._tell(TurnDelta(text, packed, (logprobs,), job.answer.settled))

    def on_done(self, job: Job) -> None:
        self._tell(None)

    def on_load_failed(self, job: Job, failure: LoadFailed) -> None:
        self._tell(failure)

    def on_failed(self, job: Job, error: Exception) -> None:
        known = isinstance(error, CachedAttentionError)
        self._tell(error if known else InternalError(f"{type(error).__name__}: {error}"))

    def _tell(self, event: TurnDelta | Preempted | Exception | None) -> None:
        self._service.mailbox.put(self._events, event)

    def on_preempted(self, job: Job) -> None:
        self._tell(Preempted())

    # -- the turn -----------------------------------------------------------------------------------------

    async def run(self) -> TurnDone:
        """Streams TurnStarted and TurnDelta to the caller and returns the final reply.

        Raises InvalidRequest, ContextLengthExceeded: the prompt; InternalError: our bug.
        """
        admitted_s = time.monotonic()
        plan = await self._plan()
        await self._call.send(TurnStarted(len(plan.prompt)))
        done = self._already_done(plan)
        if done is not None:
            return done
        job = self._job(plan, admitted_s)
        while not await self._attempt(plan, job):
            pass
        reason = self._failure_reason or self._miss_reason
        return self._finish(plan, job, account(len(plan.prompt), len(job.sampled), self._history, plan.known, reason))

    async def _attempt(self, plan: Plan, job: Job) -> bool:
        """Let the job run. True: it ended. False: it runs again, for it was preempted or its history did not arrive."""
        begun = await self._begin(plan, job)
        if not self._was_preempted:  # where the prompt came from is what the first tokens were computed from
            self._history, self._miss_reason = begun.history, begun.miss_reason
        self._enter(plan, job, begun)
        try:
            self._service.engine.submit(job)
            event = await self._follow(job)
            if isinstance(event, LoadFailed):
                job.leave()
                await self._note_failure(event)
            elif event is not None:
                self._was_preempted = True
                self._service.metrics.preemptions.inc()
                self._set_aside = await self._save_preempted(plan, job)
        except asyncio.CancelledError:
            self._service.engine.cancel(job)
            if job.save is not None and self._service.saver is not None:
                self._service.saver.abandon(job.save)  # the engine does not, if it has preempted the job meanwhile
            raise
        return event is None

    async def _note_failure(self, failure: LoadFailed) -> None:
        """Once as planned, once more where chunks turned out bad on the way, and then without the store."""
        self._load_failures += 1
        if not self._was_preempted:
            self._failure_reason = failure.reason
        self._service.metrics.load_failures.labels(failure.reason).inc()
        log.warning("history did not arrive", reason=failure.reason)
        if failure.reason == "corrupt" and failure.ref is not None and self._service.store is not None:
            await self._service.store.quarantine(failure.ref)

    async def _save_preempted(self, plan: Plan, job: Job) -> Manifest | None:
        """Save what a preempted job has computed, and let go of its memory.

        Returns its context as saved, to go on from; None: it is computed again, as far as the store does not have it.
        """
        service, save, length = self._service, job.save, job.kv.length
        token_ids = job.token_ids
        was_loaded = job.load is None or job.load.ready_layers == job.kv.shape.layers
        job.leave()
        if save is None or service.saver is None:
            return None
        if not was_loaded or service.store is None or not service.store.is_connected:
            service.saver.abandon(save)
            return None
        context = Manifest(
            turn_key=self._request.job_id,  # nobody asks for it
            namespace=plan.namespace,
            token_ids=ids.pack_tokens(token_ids),
            text="",
            chunk_ids=(),
            kv_tokens=length,
        )
        loop, ended = self._loop, asyncio.Event()
        is_saved = False

        def on_end(saved: bool) -> None:
            nonlocal is_saved
            is_saved = saved
            loop.call_soon_threadsafe(ended.set)

        service.saver.finish(save, context, on_end, is_preempted=True)
        try:
            async with asyncio.timeout(_SAVE_PREEMPTED_S):
                await ended.wait()
        except TimeoutError:
            log.warning("a preempted turn was not saved in time", tokens=length)
        finally:
            if not ended.is_set():
                service.saver.abandon(save)
        return save.saved_manifest(context) if is_saved else None

    async def _plan(self) -> Plan:
        service, request = self._service, self._request
        guide = await self._guide()
        parent, lost_reason = await self._parent()
        text = await asyncio.to_thread(render, service.model.tokenizer, request.messages)
        prompt, continues = await asyncio.to_thread(prompt_tokens, service.model.tokenizer, text, parent)
        limit = service.model.max_context
        if len(prompt) >= limit:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens; the context holds {limit}, at least one of them for the answer",
                param="messages",
            )
        if len(prompt) == 0:
            raise InternalError("the chat template rendered an empty prompt")
        namespace = ids.tenant_namespace(service.model.namespace, request.tenant_salt)
        known = known_history(prompt, parent, continues, request.parent_tokens, lost_reason)
        return Plan(text, prompt, namespace, known, parent, continues, guide)

    async def _guide(self) -> Guide | None:
        """Check what only the model's tokens show to be impossible. Raises InvalidRequest."""
        sampling, vocabulary = self._request.sampling, self._service.model.vocabulary
        for token, _ in sampling.logit_bias:
            if token >= vocabulary.size:
                raise InvalidRequest(
                    f"logit_bias: there is no token {token}; the model has {vocabulary.size}", param="logit_bias"
                )
        if sampling.logprobs is not None:
            await asyncio.to_thread(vocabulary.bytes_of, 0)  # slow the first time
        return await compile_schema(vocabulary, sampling.json_schema) if sampling.json_schema else None

    def _sampler(self, plan: Plan) -> Sampler:
        """A sampler that knows the tokens of an earlier attempt. Raises InternalError: they break the schema."""
        guide = None if plan.guide is None else plan.guide.copy()
        sampler = Sampler(self._request.sampling, self._service.model.vocabulary.size, plan.prompt, guide)
        for token in ids.unpack_tokens(self._request.resume_tokens).tolist():
            sampler.accept(token)
        return sampler

    async def _parent(self) -> tuple[Manifest | None, str]:
        service, key = self._service, self._request.parent_turn_key
        if not service.config.reuse:
            return None, "reuse_off"
        if key is None:
            return None, ""
        manifest = service.manifests.get(key)
        if manifest is not None:
            return manifest, ""
        if service.store is None:
            return None, UNAVAILABLE
        manifest, reason = await service.store.get_manifest(key, self._request.parent_wait_ms)
        if manifest is not None:
            service.manifests.put(manifest)
        return manifest, reason

    async def _begin(self, plan: Plan, job: Job) -> Begun:
        """Wait for memory, and choose where the history comes from: working KV or the store, as far as each reaches."""
        service, chunk_tokens = self._service, self._service.config.chunk_tokens
        token_ids = job.token_ids
        most = len(plan.prompt) - 1  # of the account; a job that goes on may find more
        capacity = min(len(token_ids) + self._answer_room(), self._limit())
        known = plan.known.tokens if self._set_aside is None else self._set_aside.kv_tokens
        use_store = service.store is not None and self._load_failures < 2
        miss_reason = "" if service.config.reuse else "reuse_off"
        # The memory is taken before the store is asked, for as much history as may be there.
        enough, raw_base = known or len(token_ids), known // chunk_tokens * chunk_tokens
        if not use_store:
            enough, raw_base = 1, 0

        def retained() -> RetainedMatch | None:
            match = service.retained.match(plan.namespace, token_ids) if service.config.reuse else None
            is_worth = match is not None and worth_taking(match.tokens, len(token_ids), known, chunk_tokens)
            return match if is_worth else None

        def take() -> WorkingKv:
            match = retained()
            found = service.retained.take(match, capacity) if match is not None and match.tokens >= enough else None
            return new_context(service.buffers, capacity, raw_base) if found is None else found

        while True:
            asked_s = time.monotonic()
            kv = await service.admission.enter(self._request.order, take)
            service.metrics.admission_seconds.observe(time.monotonic() - asked_s)
            if not job.sampled:
                job.admitted_s += time.monotonic() - asked_s
            if kv.length or not use_store:
                return Begun(kv, History(min(kv.length, most), hbm=min(kv.length, most)), None, miss_reason)
            lease, miss_reason = await self._acquire(plan, token_ids)
            chunks = () if lease is None else lease.chunks
            stored = account_chunks(chunks, len(token_ids)).tokens
            match = retained()  # what was there may have been taken meanwhile
            if match is not None and match.tokens >= stored:
                enough = match.tokens
            else:
                try:
                    kv.begin(stored, stored // chunk_tokens * chunk_tokens, capacity)
                    return Begun(kv, account_chunks(chunks, len(plan.prompt)), lease, miss_reason)
                except OutOfKv:  # the store has less than was known, so that more is to be saved
                    raw_base = 0
            self._release(lease)
            del kv

    def _wanted(self, plan: Plan, token_ids: TokenArray) -> Wanted:
        """The chunks to ask for, by what is known of the parent now.

        Its save may have ended since the plan was made: then its chunks have names, and its working KV may be gone.
        """
        service, parent, continues = self._service, plan.parent, plan.continues
        if parent is not None:
            parent = service.manifests.get(parent.turn_key) or parent
        if self._set_aside is not None:
            parent, continues = self._set_aside, True
        return wanted_chunks(plan.namespace, token_ids, parent, continues, service.config.chunk_tokens)

    async def _acquire(self, plan: Plan, token_ids: TokenArray) -> tuple[Lease | None, str]:
        store = self._service.store
        assert store is not None
        wanted = self._wanted(plan, token_ids)
        if not wanted.chunk_ids and wanted.partial_id is None:
            return None, ""
        return await store.acquire(
            Acquire(
                job_id=self._request.job_id,
                namespace=plan.namespace,
                chunk_ids=wanted.chunk_ids,
                partial_id=wanted.partial_id,
                partial_index=wanted.partial_index,
                lease_ms=_LEASE_MS,
            )
        )

    def _job(self, plan: Plan, admitted_s: float) -> Job:
        service, request = self._service, self._request
        resumed = ids.unpack_tokens(request.resume_tokens).tolist()
        answer = AnswerText(service.model.tokenizer, request.sampling.stop)
        for token in resumed:
            answer.feed(token)  # the client has this text already
        wanted = request.sampling.logprobs
        return Job(
            prompt=plan.prompt,
            resumed=resumed,
            sampler=self._sampler(plan),
            answer=answer,
            max_tokens=self._max_tokens(len(plan.prompt)),
            eos_ids=service.model.eos_ids,
            listener=self,
            order=request.order,
            logprobs=None if wanted is None else Logprobs(service.model.vocabulary, wanted),
            admitted_s=admitted_s,
        )

    def _enter(self, plan: Plan, job: Job, begun: Begun) -> None:
        """Give the job its working KV, and have the rest of its history loaded, and what it computes saved."""
        service, kv = self._service, begun.kv
        load = None
        if begun.lease is not None:
            load = LoadTask(
                kv,
                begun.lease.arena,
                begun.lease.chunks,
                time.monotonic() + _LOAD_DEADLINE_S,
                on_end=lambda: self._release(begun.lease),
            )
            service.loader.submit(load)
        save = None
        if service.saver is not None:
            token_ids = job.token_ids
            save = SaveTask(kv, plan.namespace, token_ids[: kv.raw.base], token_ids, service.config.chunk_tokens)
            service.saver.begin(save)
        job.enter(kv, load, save)

    def _release(self, lease: Lease | None) -> None:
        """Give a lease back. Called from the loader's thread."""
        store = self._service.store
        if store is not None and lease is not None:
            self._loop.call_soon_threadsafe(lambda: self._service.spawn(store.release(lease.lease_id)))

    async def _follow(self, job: Job) -> LoadFailed | Preempted | None:
        """Stream until the job ends. Returns what asks for another try."""
        while True:
            event = await self._events.get()
            if event is None or isinstance(event, LoadFailed | Preempted):
                return event
            if isinstance(event, Exception):
                raise event
            await self._call.send(event)

    def _finish(self, plan: Plan, job: Job, usage: TurnUsage) -> TurnDone:
        service, request = self._service, self._request
        answer = ids.Message("assistant", job.answer.text)
        key = ids.turn_key(request.request_key, answer)
        sampled = np.asarray(job.sampled, dtype=np.uint32)
        computed = np.concatenate([plan.prompt, sampled])[: job.kv.length]
        if service.config.reuse:
            # Only tokens whose text is the answer's belong to the conversation: not the end token, nor what
            # was sampled behind a stop string.
            kept, text_length = job.answer.token_boundary()
            manifest = Manifest(
                turn_key=key,
                namespace=plan.namespace,
                token_ids=ids.pack_tokens(np.concatenate([plan.prompt, sampled[:kept]])),
                text=plan.text + job.answer.text[:text_length],
                chunk_ids=(),
                kv_tokens=min(job.kv.length, len(plan.prompt) + kept),
                answer_tokens=len(sampled),
                next_speaker="tool" if calls_tool(job.answer.text) else "person",
            )
            service.keep(job, plan.namespace, computed, manifest)
        load = job.load
        service.record(usage, job)
        return TurnDone(
            finish_reason="stop" if job.finish_reason == "stop" else "length",
            turn_key=key,
            text=job.answer.text,
            tokens=ids.pack_tokens(sampled),
            usage=usage,
            prompt_tokens=ids.pack_tokens(plan.prompt) if request.return_prompt_tokens else b"",
            prefill_s=max(0.0, job.first_token_s - job.admitted_s),
            decode_s=max(0.0, job.done_s - job.first_token_s),
            load_s=load.busy_s if load is not None else 0.0,
            settled=job.answer.settled,
        )

    def _already_done(self, plan: Plan) -> TurnDone | None:
        """The outcome, where an earlier attempt had sampled the whole answer and died before it could say so."""
        request = self._request
        resumed = ids.unpack_tokens(request.resume_tokens).tolist()
        if not resumed:
            return None
        answer = AnswerText(self._service.model.tokenizer, request.sampling.stop)
        ended = resumed[-1] in self._service.model.eos_ids
        for token in resumed[:-1] if ended else resumed:
            answer.feed(token)
        stopped = ended or answer.stopped or self._sampler(plan).is_over
        if not stopped and len(resumed) < self._max_tokens(len(plan.prompt)):
            return None
        answer.finish()
        usage = account(len(plan.prompt), len(resumed), History(), plan.known, "evicted")
        return TurnDone(
            finish_reason="stop" if stopped else "length",
            turn_key=ids.turn_key(request.request_key, ids.Message("assistant", answer.text)),
            text=answer.text,
            tokens=request.resume_tokens,
            usage=usage,
            prompt_tokens=ids.pack_tokens(plan.prompt) if request.return_prompt_tokens else b"",
            settled=answer.settled,
        )

    def _limit(self) -> int:
        return self._service.model.max_context

    def _max_tokens(self, prompt: int) -> int:
        room = self._limit() - prompt
        asked = self._request.sampling.max_tokens
        return min(asked, room) if asked else room

    def _answer_room(self) -> int:
        asked = self._request.sampling.max_tokens
        return min(asked, _ANSWER_ROOM_TOKENS) if asked else _ANSWER_ROOM_TOKENS
