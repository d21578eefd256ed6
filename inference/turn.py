"""One turn in the inference process: plan its context, run it, save it. DESIGN.md section 3, steps 4 to 8."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
from inference.guided import Guide, compile_lark, compile_schema
from inference.logprobs import Logprobs
from inference.preload import LoadFailed, LoadTask
from inference.sampling import Sampler
from inference.save import SaveTask
from inference.store import UNAVAILABLE, Lease
from inference.text import AnswerText, calls_tool, prompt_tokens, raw_prompt_tokens, render, text_before, tokenize
from inference.tools import CLOSE, OPEN, Marks, tool_grammar
from inference.truncation import plan_truncation, recompute_from, truncate
from inference.working_kv import Kv, OutOfKv, RetainedMatch, new_context
from monitoring.logs import get_logger
from monitoring.traces import NOTHING, Span
from protocol import ids
from protocol.errors import CachedAttentionError, ContextLengthExceeded, InternalError, InvalidRequest
from protocol.ids import TokenArray
from protocol.lineage import Truncation, kept_ranges, kept_tokens, lineage_of, place_of
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

    def forget(self, turn_key: bytes) -> None:
        if (old := self._held.pop(turn_key, None)) is not None:
            self._used_bytes -= _size(old)


def _size(manifest: Manifest) -> int:
    return len(manifest.token_ids) + 4 * len(manifest.text) + 16 * len(manifest.chunk_ids) + 300


@dataclass(frozen=True)
class Plan:
    """A turn's prompt, what is known about its history, and what its answer must follow.

    prompt: all that was said, of which the context begins without what truncations dropped.
    """

    text: str
    prompt: TokenArray
    truncations: tuple[Truncation, ...]
    namespace: bytes
    known: Known
    parent: Manifest | None
    continues: bool  # the prompt begins with the parent's tokens
    guide: Guide | None  # at the answer's beginning

    @property
    def prompt_tokens(self) -> int:
        """In the context."""
        return kept_tokens(len(self.prompt), self.truncations)

    @property
    def context_ids(self) -> bytes:
        """Of the tokens that the context begins with."""
        return b"".join(ids.pack_tokens(self.prompt[a:b]) for a, b in kept_ranges(len(self.prompt), self.truncations))


class Sampled(NamedTuple):
    """A token of the answer, and the text that is final with it."""

    token: int
    text: str
    logprobs: SampledLogprobs | None
    settled: int  # tokens of the answer; see TurnDelta


class Preempted:
    """Somebody earlier in the gateway's order needed the job's memory."""


class ContextFull:
    """There is no position left for the job's next token."""


@dataclass(frozen=True)
class Begun:
    """Working KV with the history in it or on its way."""

    kv: Kv
    history: History
    lease: Lease | None
    miss_reason: str
    stored_tokens: int = 0  # of the lease that the job uses; more than the prompt's, where it goes on


class Turn:
    """Runs one RunTurn request. Belongs to the event loop; the listener methods are called by the engine's thread."""

    def __init__(self, service: InferenceService, call: Call, request: RunTurn, span: Span = NOTHING) -> None:
        """span: the turn's, that what happens in it is recorded under."""
        self._service = service
        self._span = span
        self._entered_s = 0.0  # the engine, to compute the first token
        self._call = call
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Sampled | Preempted | ContextFull | Exception | None] = asyncio.Queue()
        self._history, self._miss_reason = History(), ""
        self._computed_instead = 0  # tokens that the store has
        self._failure_reason = ""
        self._explained: dict[str, str] = {}  # more about reasons of misses
        self._load_failures = 0
        self._was_preempted = False
        self._set_aside: Manifest | None = None  # what a preemption saved
        self._truncations: tuple[Truncation, ...] = ()  # what of prompt and answer is not in the context

    # -- listener, on the engine's thread -----------------------------------------------------------------

    def on_token(self, job: Job, token: int, text: str, logprobs: SampledLogprobs | None) -> None:
        is_first = len(job.sampled) == len(job.resumed) + 1
        self._tell(Sampled(token, text, logprobs, job.answer.settled), urgent=is_first)

    def on_done(self, job: Job) -> None:
        self._tell(None)

    def on_load_failed(self, job: Job, failure: LoadFailed) -> None:
        self._tell(failure)

    def on_failed(self, job: Job, error: Exception) -> None:
        known = isinstance(error, CachedAttentionError)
        self._tell(error if known else InternalError(f"{type(error).__name__}: {error}"))

    def _tell(self, event: Sampled | Preempted | ContextFull | Exception | None, *, urgent: bool = True) -> None:
        self._service.mailbox.put(self._events, event, urgent=urgent)

    def on_preempted(self, job: Job) -> None:
        self._tell(Preempted())

    def on_context_full(self, job: Job) -> None:
        self._tell(ContextFull())

    # -- the turn -----------------------------------------------------------------------------------------

    async def run(self) -> TurnDone:
        """Streams TurnStarted and TurnDelta to the caller and returns the final reply.

        Raises InvalidRequest, ContextLengthExceeded: the prompt; InternalError: our bug.
        """
        admitted_s = time.monotonic()
        plan = await self._plan()
        await self._call.send(TurnStarted(plan.prompt_tokens))
        done = await self._already_done(plan)
        if done is not None:
            return done
        if (
            self._truncations != plan.truncations
        ):  # an earlier attempt dropped some of what was known, and needs it no more
            known = place_of(plan.known.tokens, len(plan.prompt), plan.truncations)
            plan = replace(plan, known=replace(plan.known, tokens=kept_tokens(known, self._truncations)))
        job = self._job(plan, admitted_s)
        while not await self._attempt(plan, job):
            pass
        reason = self._failure_reason or self._miss_reason
        usage = account(
            *(plan.prompt_tokens, len(job.sampled), self._history, plan.known, reason),
            cheaper=self._computed_instead,
            explained=self._explained,
        )
        finished = self._finish(plan, job, usage)
        await self._service.wait_write_buffer(job)
        return finished

    async def _attempt(self, plan: Plan, job: Job) -> bool:
        """Let the job run. True: it ended. False: it runs again, for it was preempted or its history did not arrive."""
        begun = await self._begin(plan, job)
        if not self._was_preempted:  # where the prompt came from is what the first tokens were computed from
            self._history, self._miss_reason, self._computed_instead = begun.history, begun.miss_reason, 0
        computed = place_of(max(begun.kv.length, begun.stored_tokens), len(job.token_ids), self._truncations)
        self._truncations = recompute_from(self._truncations, computed)
        self._enter(plan, job, begun)
        try:
            self._service.engine.submit(job)
            event = await self._follow(job)
            self._record_load(job)
            if not self._was_preempted:
                self._note_choice(plan, job, begun)
            if isinstance(event, LoadFailed):
                job.leave()
                await self._note_failure(event)
            elif isinstance(event, ContextFull) and not await self._truncate_full(plan, len(job.token_ids)):
                await self._end_full(job)
                event = None
            elif event is not None:
                self._was_preempted = True
                if isinstance(event, Preempted):
                    self._service.metrics.preemptions.inc()
                self._set_aside = await self._save_preempted(plan, job)
        except asyncio.CancelledError:
            self._service.engine.cancel(job)
            if job.save is not None and self._service.saver is not None:
                self._service.saver.abandon(job.save)  # the engine does not, if it has preempted the job meanwhile
            raise
        return event is None

    def _note_choice(self, plan: Plan, job: Job, begun: Begun) -> None:
        """What the engine computed although the store has it is no hit."""
        if begun.lease is not None and job.load is not None and job.load.start:
            self._computed_instead = job.load.start
            used = min(plan.prompt_tokens, begun.stored_tokens + 1)
            self._history = account_chunks(begun.lease.chunks, used, job.load.start)

    def _record_load(self, job: Job) -> None:
        load = job.load
        if load is not None and load.loaded_bytes:
            loaded = {"tokens": load.end - load.start, "bytes": load.loaded_bytes, "overlap": load.overlap_ratio}
            self._span.record("load", load.started_s, load.ended_s or time.monotonic(), loaded)

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
        """Save what a preempted job, or one whose context was full, has computed, and let go of its memory.

        Returns its context as saved, to go on from; None: it is computed again, as far as the store does not have it.
        What could not be saved now may have been before: a job may be preempted again while it is being loaded.
        """
        service, save, length = self._service, job.save, job.computed_tokens
        token_ids = job.token_ids
        is_whole, before = job.is_whole, self._set_aside
        if before is not None and before.truncations != job.truncations:
            before = None
        job.leave()
        if save is None or service.saver is None:
            return before
        if not is_whole or service.store is None or not service.store.is_connected:
            service.saver.abandon(save)
            return before
        context = Manifest(
            turn_key=self._request.job_id,  # nobody asks for it
            namespace=plan.namespace,
            token_ids=ids.pack_tokens(token_ids),
            text="",
            chunk_ids=(),
            kv_tokens=length,
            truncations=job.truncations,
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
        return save.saved_manifest(context) if is_saved else before

    async def _plan(self) -> Plan:
        service, request = self._service, self._request
        guide = await self._guide()
        parent, lost_reason = await self._parent()
        tokenizer, continues = service.model.tokenizer, False
        if request.prompt is not None:
            text, size = request.prompt.text, service.model.vocabulary.size
            prompt = await asyncio.to_thread(raw_prompt_tokens, tokenizer, request.prompt, size)
        else:
            text = await asyncio.to_thread(render, tokenizer, request.messages, self._functions)
            prompt, continues = await asyncio.to_thread(prompt_tokens, tokenizer, text, parent)
        if len(prompt) == 0:
            raise InternalError("the chat template rendered an empty prompt")
        # Without what was dropped, it is another context.
        continues = continues and (request.truncation == "auto" or not (parent and parent.truncations))
        await self._fit(text, prompt, parent if continues else None)
        namespace = ids.tenant_namespace(service.model.namespace, request.tenant_salt)
        known = known_history(prompt, parent, continues, request.parent_tokens, lost_reason, self._truncations)
        return Plan(text, prompt, self._truncations, namespace, known, parent, continues, guide)

    async def _fit(self, text: str, prompt: TokenArray, parent: Manifest | None) -> None:
        """Truncate the context as far as the prompt and the beginning of its answer do not fit the window.

        parent: where the prompt continues it. Raises ContextLengthExceeded.
        """
        service, window = self._service, self._service.window
        if parent is not None:
            self._truncations = parent.truncations
        tokens = kept_tokens(len(prompt), self._truncations)
        room = min(self._answer_room(), max(1, window.tokens // 8))
        if self._request.truncation == "disabled":
            if tokens >= window.tokens:
                raise ContextLengthExceeded(
                    f"the prompt has {tokens} tokens; the context holds {window.tokens}, at least one of them for the"
                    " answer",
                    param="messages" if self._request.prompt is None else "prompt",
                )
            return
        if tokens + room <= window.tokens:
            return
        head = await self._head(text)
        own = await self._own_tokens(text)
        tail, computed = len(prompt) - own, 0
        if parent is not None:
            tail, computed = min(tail, len(parent.token_ids) // 4), parent.kv_tokens
        ranges = plan_truncation(window, len(prompt), self._truncations, room=room, head=head, tail=tail)
        if ranges is not None:
            self._truncate(ranges, computed)
        elif tokens >= window.tokens:
            raise ContextLengthExceeded(
                f"the turn has {own} tokens of its own, and {window.whole(head)} at the beginning stay; the context"
                f" holds {window.tokens}, at least one of them for the answer, and is truncated by chunks of"
                f" {window.chunk_tokens}",
                param="messages",
            )
        if ranges and parent is not None:
            # What is left is loaded from the store. Where the turn before ended just now, it is still on its way there.
            await service.wait_saved(parent.turn_key, _SAVE_PREEMPTED_S)

    @property
    def _functions(self) -> str:
        """What may be called, as the chat template gets it."""
        return self._request.tools.functions if self._request.tools is not None else ""

    async def _head(self, text: str) -> int:
        """How many tokens at the beginning are never dropped."""
        config, tokenizer, messages = self._service.config, self._service.model.tokenizer, self._request.messages
        said = next((i for i, message in enumerate(messages) if message.role != "system"), 0)
        if not config.keep_system or not (said or self._functions):
            return config.keep_first
        system = await asyncio.to_thread(text_before, tokenizer, text, messages, said, self._functions)
        return max(config.keep_first, len(await asyncio.to_thread(tokenize, tokenizer, text[:system])))

    async def _own_tokens(self, text: str) -> int:
        """How many tokens the turn has of its own: those behind the last answer."""
        tokenizer, messages = self._service.model.tokenizer, self._request.messages
        first = max((i + 1 for i, message in enumerate(messages) if message.role in ("system", "assistant")), default=0)
        own = min(first, len(messages) - 1)
        before = await asyncio.to_thread(text_before, tokenizer, text, messages, own, self._functions)
        return len(await asyncio.to_thread(tokenize, tokenizer, text[before:]))

    def _truncate(self, ranges: Sequence[tuple[int, int]], computed: int) -> None:
        self._truncations = truncate(self._truncations, ranges, computed)
        if self._service.config.overflow == "recompute":
            self._truncations = recompute_from(self._truncations, 0)
        self._service.metrics.truncations.inc()
        self._service.metrics.dropped_tokens.inc(sum(end - start for start, end in ranges))

    async def _truncate_full(self, plan: Plan, length: int) -> bool:
        """Make room in a context that is full with `length` tokens of prompt and answer. False: there is none."""
        window = self._service.window
        computed = place_of(window.tokens, length, self._truncations)
        head, tail = await self._head(plan.text), computed - window.chunk_tokens
        ranges = plan_truncation(window, computed, self._truncations, room=1, head=head, tail=tail)
        if ranges:
            self._truncate(ranges, computed)
        return bool(ranges)

    async def _end_full(self, job: Job) -> None:
        """The answer ends here, because its context is full."""
        job.finish_reason, job.done_s = "length", time.monotonic()
        if rest := job.answer.finish():
            await self._call.send(TurnDelta(rest, b"", (), job.answer.settled))

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
        if sampling.json_schema:
            return await compile_schema(vocabulary, sampling.json_schema)
        tools, chosen = self._request.tools, self._service.model.tool_format
        if tools is None:
            return None
        if not chosen:
            raise InvalidRequest("this model's chat template knows no tools", param="tools")
        grammar = tool_grammar(tools, chosen, Marks(vocabulary.token_of(OPEN), vocabulary.token_of(CLOSE)))
        return await compile_lark(vocabulary, grammar, "tools") if grammar else None

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
            return None, self._request.parent_reason
        manifest = service.manifests.get(key)
        if manifest is not None:
            return manifest, ""
        if service.store is None:
            return None, UNAVAILABLE
        manifest, reason = await service.store.get_manifest(key, self._request.parent_wait_ms, self._span.traceparent)
        if manifest is not None:
            service.manifests.put(manifest)
        return manifest, reason

    async def _begin(self, plan: Plan, job: Job) -> Begun:
        """Wait for memory, and choose where the history comes from: working KV or the store, as far as each reaches."""
        service, chunk_tokens = self._service, self._service.config.chunk_tokens
        token_ids = job.token_ids
        truncations = self._truncations
        tokens = kept_tokens(len(token_ids), truncations)
        most = plan.prompt_tokens - 1  # of the account; a job that goes on may find more
        capacity = min(tokens + self._answer_room(), service.window.tokens)
        known = plan.known.tokens
        if self._set_aside is not None:
            known = kept_tokens(self._set_aside.kv_tokens, truncations)
        use_store = service.store is not None and self._load_failures < 2
        miss_reason = "" if service.config.reuse else "reuse_off"
        # The memory is taken before the store is asked, for as much history as may be there.
        enough, raw_base = known or tokens, known // chunk_tokens * chunk_tokens
        if not use_store:
            enough, raw_base = 1, 0

        def retained() -> RetainedMatch | None:
            match = service.retained.match(plan.namespace, token_ids, truncations) if service.config.reuse else None
            is_worth = match is not None and worth_taking(match.tokens, tokens, known, chunk_tokens)
            return match if is_worth else None

        def take() -> Kv:
            match = retained()
            found = service.retained.take(match, capacity) if match is not None and match.tokens >= enough else None
            return new_context(service.buffers, capacity, raw_base) if found is None else found

        while True:
            asked_s = time.monotonic()
            kv = await service.admission.enter(self._request.order, take)
            service.metrics.admission_seconds.observe(time.monotonic() - asked_s)
            self._span.record("admission", asked_s, time.monotonic())
            if not job.sampled:
                job.admitted_s += time.monotonic() - asked_s
            if kv.length or not use_store:
                return Begun(kv, History(min(kv.length, most), hbm=min(kv.length, most)), None, miss_reason)
            wanted = self._wanted(plan, token_ids)
            lease, miss_reason = await self._acquire(plan, wanted)
            chunks = () if lease is None else lease.chunks
            reach = wanted.reach(chunks) + 1
            stored = account_chunks(chunks, min(tokens, reach)).tokens
            match = retained()  # what was there may have been taken meanwhile
            if match is not None and match.tokens >= stored:
                enough = match.tokens
            else:
                try:
                    # Where the engine may choose to compute part of it, history begins to count when it is there.
                    # Of a truncated context it may not: computed without what was dropped, it is other KV.
                    may_compute = service.config.load_or_compute == "auto" and not truncations
                    kv.begin(0 if may_compute else stored, stored // chunk_tokens * chunk_tokens, capacity)
                    history = account_chunks(chunks, min(plan.prompt_tokens, reach))
                    return Begun(kv, history, lease, miss_reason, stored)
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
        return wanted_chunks(
            plan.namespace, token_ids, parent, continues, service.config.chunk_tokens, self._truncations
        )

    async def _acquire(self, plan: Plan, wanted: Wanted) -> tuple[Lease | None, str]:
        store = self._service.store
        assert store is not None
        if not wanted.chunk_ids and wanted.partial_id is None:
            return None, ""
        lease, reason, explained = await store.acquire(
            Acquire(
                job_id=self._request.job_id,
                namespace=plan.namespace,
                chunk_ids=wanted.chunk_ids,
                partial_id=wanted.partial_id,
                partial_index=wanted.partial_index,
                lease_ms=_LEASE_MS,
                trace=self._span.traceparent,
            )
        )
        if explained:
            self._explained[reason] = explained
        return lease, reason

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
            max_tokens=self._max_tokens(plan.prompt_tokens),
            eos_ids=service.model.eos_ids,
            listener=self,
            order=request.order,
            window=service.window.tokens,
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
                end=begun.stored_tokens,
                new_tokens=kept_tokens(len(job.token_ids), self._truncations) - begun.stored_tokens,
                is_layer_wise=service.config.preload,
            )
            service.loader.submit(load)
        save = None
        if service.saver is not None and self._request.save:
            token_ids, chunk_tokens = job.context_ids(self._truncations), service.config.chunk_tokens
            links = lineage_of(plan.namespace, job.token_ids, chunk_tokens, self._truncations).links
            save = SaveTask(kv, plan.namespace, token_ids[: kv.raw.base], token_ids, chunk_tokens, links)
            save.span = self._span.child("save", time.monotonic())
            if service.config.save == "async":
                service.saver.begin(save)
        job.enter(kv, load, save, self._truncations)
        if not job.first_token_s:
            self._entered_s = time.monotonic()

    def _release(self, lease: Lease | None) -> None:
        """Give a lease back. Called from the loader's thread."""
        store = self._service.store
        if store is not None and lease is not None:
            self._loop.call_soon_threadsafe(lambda: self._service.spawn(store.release(lease.lease_id)))

    async def _follow(self, job: Job) -> LoadFailed | Preempted | ContextFull | None:
        """Stream until the job ends. Returns what asks for another try."""
        while True:
            event = await self._events.get()
            sampled = []
            while isinstance(event, Sampled):
                sampled.append(event)
                if self._events.empty():
                    break
                event = self._events.get_nowait()
            if sampled:
                await self._call.send(_delta(sampled))
            if isinstance(event, Exception) and not isinstance(event, LoadFailed):
                raise event
            if not isinstance(event, Sampled):
                return event

    def _finish(self, plan: Plan, job: Job, usage: TurnUsage) -> TurnDone:
        service, request = self._service, self._request
        answer = ids.Message("assistant", job.answer.text)
        key = ids.turn_key(request.request_key, answer)
        sampled = np.asarray(job.sampled, dtype=np.uint32)
        said = np.concatenate([plan.prompt, sampled])
        computed, truncations = job.computed_tokens, job.truncations
        if service.config.reuse:
            # Only tokens whose text is the answer's belong to the conversation: not the end token, nor what
            # was sampled behind a stop string.
            kept, text_length = job.answer.token_boundary()
            manifest = Manifest(
                turn_key=key,
                namespace=plan.namespace,
                token_ids=ids.pack_tokens(said[: len(plan.prompt) + kept]),
                text=plan.text + job.answer.text[:text_length],
                chunk_ids=(),
                kv_tokens=min(computed, len(plan.prompt) + kept),
                truncations=truncations,
                answer_tokens=len(sampled),
                next_speaker="tool" if calls_tool(job.answer.text, request.tools is not None) else "person",
                prompt_tokens=len(plan.prompt),
                prompt_chars=len(plan.text),
            )
            if all(one.at <= manifest.kv_tokens for one in truncations):
                service.keep(job, plan.namespace, said[:computed], manifest)
            elif job.save is not None and service.saver is not None:  # what was cut off was truncated for
                service.saver.abandon(job.save)
        load, rate = job.load, service.rates.prefill
        service.record(usage, job)
        self._span.record("prefill", self._entered_s, job.first_token_s, {"tokens": usage.prompt_tokens})
        self._span.record("decode", job.first_token_s, job.done_s, {"tokens": usage.completion_tokens})
        return TurnDone(
            finish_reason="stop" if job.finish_reason == "stop" else "length",
            turn_key=key,
            text=job.answer.text,
            tokens=ids.pack_tokens(sampled),
            usage=replace(usage, recompute_s=rate.seconds(0, usage.prompt_tokens) if rate.is_known else 0.0),
            prompt_tokens=plan.context_ids if request.return_prompt_tokens else b"",
            prefill_s=max(0.0, job.first_token_s - job.admitted_s),
            decode_s=max(0.0, job.done_s - job.first_token_s),
            load_s=load.busy_s if load is not None else 0.0,
            settled=job.answer.settled,
            **self._dropped(len(said)),
        )

    def _dropped(self, length: int) -> dict[str, Any]:
        """What TurnDone tells of truncation, with `length` tokens of prompt and answer."""
        kept = kept_ranges(length, self._truncations)
        dropped = length - sum(end - start for start, end in kept)
        return {"dropped_tokens": dropped, "kept": kept} if dropped else {}

    async def _already_done(self, plan: Plan) -> TurnDone | None:
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
        length = len(plan.prompt) + len(resumed)
        if not stopped and len(resumed) < self._max_tokens(plan.prompt_tokens):
            is_full = False  # as the earlier attempt made room, so is it made again
            while not is_full and kept_tokens(length, self._truncations) > self._service.window.tokens:
                is_full = not await self._truncate_full(plan, length)
            if not is_full:
                return None
        answer.finish()
        usage = account(plan.prompt_tokens, len(resumed), History(), plan.known, "evicted")
        return TurnDone(
            finish_reason="stop" if stopped else "length",
            turn_key=ids.turn_key(request.request_key, ids.Message("assistant", answer.text)),
            text=answer.text,
            tokens=request.resume_tokens,
            usage=usage,
            prompt_tokens=plan.context_ids if request.return_prompt_tokens else b"",
            settled=answer.settled,
            **self._dropped(length),
        )

    def _max_tokens(self, prompt: int) -> int:
        """prompt: tokens of the context before the answer."""
        window, asked = self._service.window.tokens, self._request.sampling.max_tokens
        if self._request.truncation == "auto":
            return asked or window
        return min(asked or window, window - prompt)

    def _answer_room(self) -> int:
        asked = self._request.sampling.max_tokens
        return min(asked, _ANSWER_ROOM_TOKENS) if asked else _ANSWER_ROOM_TOKENS


def _delta(sampled: Sequence[Sampled]) -> TurnDelta:
    text, tokens = "".join(one.text for one in sampled), ids.pack_tokens([one.token for one in sampled])
    logprobs = tuple(one.logprobs for one in sampled if one.logprobs is not None)
    return TurnDelta(text, tokens, logprobs, sampled[-1].settled) if logprobs else TurnDelta(text, tokens)
