"""Every message that crosses a socket, as a frozen type.

MessagePack carries a map per message (see codec.py); fields added later get defaults and never change
meaning, and a field that a receiver does not know is ignored, so neighbouring versions understand each other.
What a message has many of are rows: named tuples, which travel as columns (table.py). KV
bytes are never in a message: they lie in the arena, and messages carry slots.

    gateway   -> inference  GetModel, RunTurn, Tokenize, Detokenize, ForgetTurns, GetWorkingKv
    gateway   -> kvdaemon   QueueOrder, Anticipate, MeasureNamespaces, DescribeTurns, Erase, GetStatus
    cli       -> kvdaemon   DescribeStore, FindTurns, ListManifests, LocateChunks, ScrubStore, Erase, and as inference
    inference -> kvdaemon   OpenStore, GetManifest, Acquire, Quarantine, Release, Reserve, Unreserve, Commit,
                            SaveManifest
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar, dataclass_transform

from protocol.fields import Bool, Bytes, Count, Float, Id, Int, Str, Tokens
from protocol.lineage import Truncation
from protocol.table import Rows

T = TypeVar("T")
MAX_DESCRIBED = 1024  # turns in a DescribeTurns
REGISTRY: dict[str, type] = {}


@dataclass_transform(frozen_default=True)
def message(tag: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass of the class and register it under `tag`, its name on the wire."""

    def register(cls: type[T]) -> type[T]:
        if tag in REGISTRY:
            raise ValueError(f"two messages are tagged {tag!r}")
        frozen = dataclass(frozen=True, slots=True)(cls)
        REGISTRY[tag] = frozen
        return frozen

    return register


def tag_of(cls: type) -> str:
    """The wire name of a message type. Raises KeyError: not a message."""
    return _TAGS[cls]


# -- any peer ---------------------------------------------------------------------------------------------


@message("hello")
class Hello:
    """First request on every connection: who speaks. Answered by Welcome, or refused for the version."""

    protocol_version: Int
    role: Str  # "gateway" | "inference" | "cli"
    client_id: Id  # random per process start
    heartbeat_s: Float = 1.0  # the sender promises traffic at least this often


@message("welcome")
class Welcome:
    protocol_version: Int
    service: Str
    epoch: Id  # random per start of the serving process: a new epoch means it forgot what we told it


@message("ping")
class Ping:
    """Keeps the server's picture of its peer alive."""


@message("ack")
class Ack:
    """Done, nothing to tell."""


# -- gateway to inference ---------------------------------------------------------------------------------


@message("get_model")
class GetModel:
    """Ask what is served."""


@message("model_info")
class ModelInfo:
    model: Str  # the name in the API
    namespace: Id  # ids.model_namespace
    template_digest: Id
    max_context: Count  # tokens
    max_running: Count  # turns that may be dispatched at once
    reuse: Bool = True  # False: --no-reuse, history is always recomputed
    device: Str = "cpu"
    dtype: Str = "float32"
    # How the model writes a call of a tool, by its chat template; empty: the template knows no tools.
    tool_format: Literal["", "hermes", "llama3"] = ""


@message("chat_message")
class ChatMessage:
    """One message of a conversation, as the chat template sees it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Str
    name: Str = ""
    tool_call_id: Str = ""
    tool_calls: Str = ""  # canonical JSON of OpenAI's list, or empty


@message("sampling")
class Sampling:
    """How tokens are chosen. The defaults change nothing; inference/sampling.py says in which order they act."""

    max_tokens: Count = 0  # 0: up to the end of the context
    temperature: Float = 1.0  # 0: greedy
    top_p: Float = 1.0
    stop: tuple[Str, ...] = ()
    seed: Int | None = None  # None: any; a turn that may be run again brings one
    top_k: Count = 0  # 0: all tokens
    min_p: Float = 0.0
    repetition_penalty: Float = 1.0
    presence_penalty: Float = 0.0
    frequency_penalty: Float = 0.0
    logit_bias: tuple[tuple[Count, Float], ...] = ()  # (token id, what is added to its logit)
    logprobs: Count | None = None  # None: not wanted; else so many alternatives for each token
    json_schema: Str = ""  # the answer is JSON that this schema allows; empty: it is text


@message("tools")
class Tools:
    """What a model may call. functions: JSON of OpenAI's list of tools, in the client's own order."""

    functions: Str
    choice: Literal["auto", "none", "required"] = "auto"
    name: Str = ""  # required: this one
    parallel: Bool = True  # more than one call in an answer


@message("prompt")
class Prompt:
    """A prompt as it is, which no chat template is to render: text, or token ids where there are any."""

    text: Str
    tokens: Tokens = b""


@message("run_turn")
class RunTurn:
    """Run one turn. Streams TurnStarted, then TurnDelta; the final reply is TurnDone.

    The context begins at `parent_turn_key` where the journal knows one; `parent_tokens` is what that turn
    left behind (prompt + generated - 1), so that a lost manifest is still counted as a miss of so many tokens.
    """

    job_id: Id
    messages: tuple[ChatMessage, ...]
    request_key: Id  # turn key after `messages`; the answer's own key is chained on it
    tenant_salt: Bytes
    sampling: Sampling
    parent_turn_key: Id | None = None
    parent_tokens: Count = 0
    # Why the parent's context cannot be used, where the gateway knows: "model_changed", "tenant_differs".
    parent_reason: Str = ""
    # The parent ended so lately, at another worker, that its context may not be saved yet: wait so long for it.
    parent_wait_ms: Count = 0
    # The answer so far, where an earlier attempt died after streaming part of it: the turn continues from there.
    resume_tokens: Tokens = b""
    return_prompt_tokens: Bool = False
    # The turn's place in the gateway's order, lowest first: who gets memory and who is preempted.
    order: Count = 0
    # Whether a context that outgrows the window loses its oldest part. Disabled: all that was said must fit.
    truncation: Literal["auto", "disabled"] = "auto"
    tools: Tools | None = None
    prompt: Prompt | None = None  # instead of `messages`, which then say it to the journal
    save: Bool = True  # False: what is computed is not stored; hits are as ever
    trace: Str = ""  # W3C traceparent of the span that asks; empty: not traced. So in the messages below


@message("turn_usage")
class TurnUsage:
    """Where each token of the prompt, as far as it is in the context, came from, in tokens:
    hbm + dram + ssd + computed + sum(missed) = prompt_tokens.

    computed: new in this turn. missed: computed too, though an earlier turn had computed them already, by
    reason: "evicted", "unknown", "no_capacity", "manifest_lost", "daemon_unavailable", "corrupt", "revoked",
    "load_failed", "text_changed", "reuse_off", "computing_was_cheaper" (than loading), "model_changed",
    "tenant_differs". explained: more about such a reason in words, where there is more to know.
    """

    prompt_tokens: Count
    completion_tokens: Count
    hbm: Count = 0
    dram: Count = 0
    ssd: Count = 0
    computed: Count = 0
    missed: dict[Str, Count] = field(default_factory=dict)
    explained: dict[Str, Str] = field(default_factory=dict)
    recompute_s: Float = 0.0  # estimated prefill had all of it been computed, at measured rates; 0: not known


@message("turn_started")
class TurnStarted:
    """The turn was admitted: the request is valid and its prompt is planned."""

    prompt_tokens: Count


@message("token_logprob")
class TokenLogprob:
    """A token as its bytes in a text, which need not be whole characters, and its natural log probability."""

    bytes: Bytes
    logprob: Float
    name: Str = ""  # of a token that has no bytes, such as one that ends a message


@message("sampled_logprobs")
class SampledLogprobs:
    """A sampled token, and the most probable ones in its place, best first. As the model has it: before any bias,
    penalty, temperature or schema."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@message("turn_delta")
class TurnDelta:
    """A piece of the answer: text that is final, and the tokens sampled since the last delta.

    Where logprobs were asked for: those of `tokens`, and how many tokens of the answer are settled so far: text of
    theirs was given out, or they have none. What a stop string may still take back is not settled.
    """

    text: Str
    tokens: Tokens
    logprobs: tuple[SampledLogprobs, ...] = ()
    settled: Count = 0


@message("turn_done")
class TurnDone:
    finish_reason: Literal["stop", "length"]
    turn_key: Id
    text: Str  # the whole answer; equals the deltas put together
    tokens: Tokens  # all sampled ids, the end token included
    usage: TurnUsage
    prompt_tokens: Tokens = b""  # only where asked for
    prefill_s: Float = 0.0  # admission to first token, the paper's TTFT
    decode_s: Float = 0.0
    load_s: Float = 0.0  # busy time of the loader for this turn
    settled: Count = 0  # leading `tokens` that made `text`: neither the end token nor those behind a stop string
    # What the context has lost of all that was said, and what is left: ranges of token places in prompts and answers.
    dropped_tokens: Count = 0
    kept: tuple[tuple[Count, Count], ...] = ()  # told where something was dropped


@message("tokenize")
class Tokenize:
    """Ask for the token ids of a text, or of messages as the chat template renders them."""

    text: Str = ""
    messages: tuple[ChatMessage, ...] = ()
    tools: Str = ""  # as Tools.functions
    add_special_tokens: Bool = True  # to a text, as the tokenizer does; a template brings its own
    add_generation_prompt: Bool = True
    want_strings: Bool = False


@message("tokenized")
class Tokenized:
    tokens: Tokens
    strings: tuple[Str, ...] = ()  # how the tokenizer writes each; only where asked for


@message("detokenize")
class Detokenize:
    """Ask for the text of token ids."""

    tokens: Tokens


@message("detokenized")
class Detokenized:
    text: Str


@message("forget_turns")
class ForgetTurns:
    """Let go of these turns' contexts on the device, and overwrite them. The store has them still: Erase comes next.

    Those that are being saved are waited for, so that they are there for it.
    """

    turn_keys: tuple[Id, ...]


@message("turns_forgotten")
class TurnsForgotten:
    """bytes: of KV that the contexts held. unsaved: how many turns are being saved still, and are not forgotten."""

    contexts: Count = 0
    bytes: Count = 0
    unsaved: Count = 0


@message("get_working_kv")
class GetWorkingKv:
    """How full is the device's KV?"""


@message("working_kv")
class WorkingKv:
    """used_bytes: of running turns, of those that are not saved yet, and of finished ones, which are retained_bytes."""

    capacity_bytes: Count
    used_bytes: Count
    retained_bytes: Count


# -- inference to kvdaemon --------------------------------------------------------------------------------


@message("geometry")
class GeometryFields:
    """The shape of a chunk in bytes; see arena.Geometry."""

    layers: Count
    key_bytes: Count  # per token and layer
    value_bytes: Count
    chunk_tokens: Count


@message("open_store")
class OpenStore:
    """Bind this connection to an arena of this geometry. Formats the arena where nobody else uses it.

    Refused with CapacityError while a client of another geometry lives, or where the tmpfs is too small.
    """

    geometry: GeometryFields
    model_namespace: Id


@message("store_opened")
class StoreOpened:
    arena_path: Str
    arena_id: Id  # changes when the arena is formatted anew; slots of another arena_id mean nothing
    slots: Count
    lease_ms: Count  # longest lease the daemon grants


@message("manifest")
class Manifest:
    """The context saved under a turn key.

    token_ids holds all that was said, including the last sampled token, whose KV was never computed; kv_tokens of
    them were computed. Those that the truncations left are the context, in chunk_ids. text is the rendered prompt and
    the answer, as the client saw it.
    """

    turn_key: Id
    namespace: Id  # ids.tenant_namespace
    token_ids: Tokens
    text: Str
    chunk_ids: tuple[Id, ...]  # oldest first; the last one may be partial
    kv_tokens: Count
    truncations: tuple[
        Truncation, ...
    ] = ()  # what the context has lost of token_ids, in the order in which it happened
    # What tells placement when the next turn may come:
    answer_tokens: Count = 0  # 0: not known
    next_speaker: Literal["", "person", "tool"] = ""  # "": nobody knows
    # Where the answer begins, in token_ids and in text: a conversation may go on from there otherwise. 0: not known.
    prompt_tokens: Count = 0
    prompt_chars: Count = 0


@message("get_manifest")
class GetManifest:
    turn_key: Id
    wait_ms: Count = 0  # if it is not there: how long to wait for somebody to save it
    trace: Str = ""


@message("manifest_reply")
class ManifestReply:
    manifest: Manifest | None  # None: a miss, never an error
    reason: Str = ""  # for a miss: "manifest_lost" or "corrupt"


@message("acquire")
class Acquire:
    """Keep the longest available prefix of these chunks readable until released.

    chunk_ids are the full chunks of the prompt, oldest first. Where a saved context ends in a partial chunk,
    `partial_id` may stand in for chunk_ids[partial_index] when the full one is missing. Chunks that are only
    on SSD get a slot at once and arrive there layer by layer.
    """

    job_id: Id
    namespace: Id
    chunk_ids: tuple[Id, ...]
    partial_id: Id | None = None
    partial_index: Count = 0
    lease_ms: Count = 30_000
    trace: Str = ""
    released: tuple[Id, ...] = ()  # leases given back on the way; those that ended already do no harm


class SlotRef(NamedTuple):
    slot: Count
    generation: Count
    chunk_id: Id
    tokens: Count
    tier: Literal["dram", "ssd"]  # where the chunk was when asked for
    verify: Bool = False  # check the layer checksums of this one while loading


@message("acquired")
class Acquired:
    """The lease, and the chunks of the longest available prefix. Watch ready_layers in the slot table.

    miss_reason says why the prefix ends before the list does: "", "evicted", "unknown", "corrupt" or
    "no_capacity" (on SSD, but no slot could be freed).
    """

    lease_id: Id
    chunks: Rows[SlotRef]
    miss_reason: Str = ""
    miss_explained: Str = ""  # more about it in words: which tier lost the chunk, and when


@message("quarantine")
class Quarantine:
    """A leased chunk does not have the checksum that its writer noted: never hand it out again."""

    slot: Count
    generation: Count
    chunk_id: Id


@message("release")
class Release:
    lease_id: Id


@message("reserve")
class Reserve:
    """Ask for empty slots to save into. Never waits: fewer slots than asked for is an answer."""

    count: Count


class ReservedSlot(NamedTuple):
    slot: Count
    generation: Count


@message("reserved")
class Reserved:
    slots: Rows[ReservedSlot]


@message("unreserve")
class Unreserve:
    slots: Rows[ReservedSlot]


class CommittedChunk(NamedTuple):
    """A reserved slot that now holds a whole chunk: every layer written, checksums and token count in the table."""

    slot: Count
    generation: Count
    chunk_id: Id
    parent_id: Id
    namespace: Id
    tokens: Count


@message("commit")
class Commit:
    """Take chunks into the store, and what else is to be said by then: a message costs more than what it says."""

    chunks: Rows[CommittedChunk]
    trace: Str = ""
    manifest: Manifest | None = None  # saved where all chunks are accepted, before this is answered
    reserve: Count = 0  # empty slots, as with Reserve
    released: tuple[Id, ...] = ()  # leases, as with Acquire


@message("committed")
class Committed:
    """Per chunk of the Commit: True, it is in the store (also when it was there before); False, refused."""

    accepted: tuple[Bool, ...]
    slots: Rows[ReservedSlot] = ()


@message("save_manifest")
class SaveManifest:
    """Keep a context whose chunks are in the store."""

    manifest: Manifest
    trace: Str = ""


# -- to kvdaemon, from the gateway and the command line ---------------------------------------------------------


@message("queue_order")
class QueueOrder:
    """A hint: these conversations will be needed, in this order. Replaces the order told before."""

    turn_keys: tuple[Id, ...]  # parent turn keys of the waiting jobs, head first


@message("anticipate")
class Anticipate:
    """A hint: the next turn after this one is expected in about so many seconds.

    fetch: bring its context into DRAM now, behind those of waiting turns; it stays there for about so long.
    """

    turn_key: Id
    in_s: Float
    fetch: Bool = False


@message("describe_turns")
class DescribeTurns:
    """Ask where the contexts of these turns lie."""

    turn_keys: tuple[Id, ...]  # at most MAX_DESCRIBED


class TurnPlace(NamedTuple):
    """A saved context, in tokens with KV; see ManifestEntry. All zero: none is saved under this key."""

    turn_key: Id
    kv_tokens: Count
    stored_tokens: Count
    dram_tokens: Count
    ssd_tokens: Count
    last_hit_s: Float


@message("turns_described")
class TurnsDescribed:
    """One place for each turn asked for, in its order; bytes of all their chunks, shared ones counted once."""

    turns: Rows[TurnPlace]
    dram_bytes: Count
    ssd_bytes: Count
    leases: Count


@message("get_status")
class GetStatus:
    """Ask for the store's state."""


@message("measure_namespaces")
class MeasureNamespaces:
    """Ask how much KV is stored in each of these; see ids.tenant_namespace."""

    namespaces: tuple[Id, ...]


@message("namespaces_measured")
class NamespacesMeasured:
    """One for each, in its order. A chunk counts once, in however many tiers it lies."""

    bytes: tuple[Count, ...]


@message("tier_status")
class TierStatus:
    capacity_bytes: Count
    used_bytes: Count
    chunks: Count


@message("store_status")
class StoreStatus:
    state: Literal["ok", "degraded"]
    reason: Str
    dram: TierStatus
    ssd: TierStatus
    leases: Count
    reserved_slots: Count
    manifests: Count
    # Waiting turns that are looked at for prefetching, and whose conversations leave the tiers last; the paper's 3.3.
    prefetch_window: Count = 0
    eviction_window: Count = 0


# -- to kvdaemon, from the command line: what is stored, whether it is whole, and its removal ----------------------


@message("describe_store")
class DescribeStore:
    """Ask what KV the store holds, before exporting from it or importing into it."""


@message("store_description")
class StoreDescription:
    geometry: GeometryFields | None  # None: no client has opened the store yet
    namespaces: tuple[Id, ...]  # of all chunks there are


@message("find_turns")
class FindTurns:
    """Which saved turns' keys begin with these hexadecimal digits? Asked of the front, and by it of the SSD worker."""

    prefix: Str
    limit: Count = 8


@message("found_turns")
class FoundTurns:
    turn_keys: tuple[Id, ...]  # ascending, at most `limit`
    problem: Str = ""  # why the SSD could not be asked


@message("chunk_place")
class ChunkPlace:
    """Where a chunk lies, in bytes of KV by tier; 0: not there. tokens is 0 where it lies nowhere."""

    tokens: Count = 0
    dram_bytes: Count = 0
    ssd_bytes: Count = 0
    leases: Count = 0


@message("locate_chunks")
class LocateChunks:
    chunk_ids: tuple[Id, ...]


@message("chunk_places")
class ChunkPlaces:
    """One for each chunk asked for, in its order."""

    places: tuple[ChunkPlace, ...]


@message("list_manifests")
class ListManifests:
    """List saved contexts without their text, a page at a time, in the order of turn keys after `after`.

    Asked of the front, and by it of the SSD worker, which knows nothing of tiers and hits.
    """

    after: Bytes = b""
    limit_bytes: Count = 512 * 1024  # a page ends with the manifest that exceeds it


@message("manifest_entry")
class ManifestEntry:
    """A saved context as a list shows it.

    token_ids, kv_tokens and truncations as in Manifest. saved_s and last_hit_s are wall clock; 0: not known.
    last_hit_s: when the context was last handed out to its end, since the daemon started. dram_, ssd_: the part of its
    KV that is in a tier; end_: the last chunk alone, which the turns that continue this one do not share where it is
    partial.
    """

    turn_key: Id
    namespace: Id
    token_ids: Tokens
    kv_tokens: Count
    chunk_ids: tuple[Id, ...]
    text_bytes: Count
    saved_s: Float = 0.0
    last_hit_s: Float = 0.0
    stored_tokens: Count = 0  # in either tier
    dram_tokens: Count = 0
    dram_bytes: Count = 0
    ssd_tokens: Count = 0
    ssd_bytes: Count = 0
    end_dram_bytes: Count = 0
    end_ssd_bytes: Count = 0
    truncations: tuple[Truncation, ...] = ()


@message("manifest_page")
class ManifestPage:
    entries: tuple[ManifestEntry, ...]
    more: Bool
    problem: Str = ""  # why the SSD could not be asked: these are the ones in memory


@message("scrub_store")
class ScrubStore:
    """Verify every chunk of both tiers and every manifest now. Streams ScrubProgress; the end is a ScrubReport."""


@message("scrub_progress")
class ScrubProgress:
    tier: Literal["dram", "ssd", "manifests"]
    done: Count  # chunks or manifests so far
    total: Count  # about how many there are


@message("scrub_report")
class ScrubReport:
    """What a full scrub read, and what it found damaged and put aside."""

    dram_chunks: Count
    dram_bytes: Count
    ssd_chunks: Count
    ssd_bytes: Count
    manifests: Count
    dram_damaged: tuple[Id, ...] = ()  # chunk ids; an undamaged copy on SSD stays
    ssd_damaged: tuple[Id, ...] = ()  # chunk ids
    manifests_damaged: tuple[Id, ...] = ()  # turn keys
    skipped: Count = 0  # chunks in DRAM that were on their way in or out
    problem: Str = ""  # why the SSD, or the rest of it, was not read


@message("erase")
class Erase:
    """Remove a turn, the turns that continue it, and the earlier ones that nothing else continues, with their KV.

    Chunks that another saved context needs stay. The removal goes on to its end whether or not anybody waits.
    keep: earlier turns that stay although the store knows nothing that continues them: another conversation will.
    """

    turn_key: Id
    keep: tuple[Id, ...] = ()


@message("erasure_receipt")
class ErasureReceipt:
    """What was removed from which tier, and what could not be.

    shared_chunks: of the erased contexts, kept because other contexts need them. wiped_bytes: overwritten with zeros in
    the arena: the chunks' slots, and whatever earlier chunks had left in memory that is in no use. deferred_slots: in
    the hands of clients just now; what is left in them is overwritten when they are filled or come back. ssd_physical:
    bytes of the database's files before, and after the compaction that followed.
    """

    turn_keys: tuple[Id, ...]
    dram_chunks: tuple[Id, ...]
    dram_bytes: Count
    wiped_bytes: Count
    ssd_chunks: tuple[Id, ...]
    ssd_bytes: Count
    ssd_manifests: Count
    ssd_physical_before: Count
    ssd_physical_after: Count
    shared_chunks: Count
    leases_revoked: Count
    deferred_slots: Count
    left: tuple[Str, ...] = ()  # one sentence for each thing that may still be somewhere


# -- kvdaemon's front to its SSD worker ---------------------------------------------------------------------


@message("attach_arena")
class AttachArena:
    """Map the arena at `path`; forget any other."""

    path: Str
    arena_id: Id


@message("ssd_write")
class SsdWrite:
    """Write the chunk in `slot`. Refused where the generation moved on."""

    slot: Count
    generation: Count


@message("ssd_read_chunk")
class SsdReadChunk:
    chunk_id: Id
    slot: Count
    generation: Count


@message("ssd_read")
class SsdRead:
    """Bring chunks into slots, layer by layer over all of them; a layer is ready when it is there and verified."""

    chunks: tuple[SsdReadChunk, ...]
    background: Bool = False  # a prefetch: gives way to reads that somebody waits for


@message("ssd_read_done")
class SsdReadDone:
    """Per chunk: "ok", "missing" or "corrupt". A chunk that is not ok is quarantined and its slot is not ready."""

    outcomes: tuple[Str, ...]


@message("ssd_written")
class SsdWritten:
    bytes: Count
    outcome: Literal["ok", "stale", "corrupt", "full"]
    # corrupt: the slot's bytes do not have its checksums; full: chunks must leave the tier before another can come


@message("ssd_delete")
class SsdDelete:
    chunk_ids: tuple[Id, ...]


class SsdRecord(NamedTuple):
    """What the SSD tier knows of one chunk."""

    chunk_id: Id
    parent_id: Id
    namespace: Id
    tokens: Count
    bytes: Count
    written_s: Float = 0.0  # wall clock; orders chunks by age after a restart


@message("ssd_list")
class SsdList:
    """List chunk records, a page at a time, in key order after `after`."""

    after: Bytes = b""
    limit: Count = 4096


@message("ssd_page")
class SsdPage:
    records: Rows[SsdRecord]
    more: Bool


@message("ssd_put_manifest")
class SsdPutManifest:
    manifest: Manifest


@message("ssd_get_manifest")
class SsdGetManifest:
    turn_key: Id


@message("ssd_scrub")
class SsdScrub:
    """Read and verify records in key order after `after`; what is damaged is deleted."""

    what: Literal["chunks", "manifests"]
    after: Bytes = b""
    limit_bytes: Count = 64 * 1024 * 1024  # a page ends with the record that exceeds it


@message("ssd_scrubbed")
class SsdScrubbed:
    """last: where to go on; empty: that was the last page. bytes: of KV, for chunks.

    damaged: keys; ids.ROOT stands for a block of the database that cannot be read, with whatever records it held.
    """

    records: Count
    bytes: Count
    damaged: tuple[Id, ...]
    last: Bytes = b""


@message("ssd_erase")
class SsdErase:
    """Delete these, so that no file has their bytes any more."""

    chunk_ids: tuple[Id, ...]
    turn_keys: tuple[Id, ...]


@message("ssd_erased")
class SsdErased:
    """Which of them were there, and the physical bytes of the tier before and after."""

    chunk_ids: tuple[Id, ...]
    bytes: Count
    manifests: Count
    physical_before: Count
    physical_after: Count


@message("ssd_status_request")
class SsdStatusRequest:
    """Ask the worker for its physical size."""


@message("ssd_status")
class SsdStatus:
    physical_bytes: Count
    manifests: Count
    error: Str = ""
    moved_aside: Str = ""  # where a damaged database went when this worker started
    corrupt_records: Count = 0  # manifests and chunk records found damaged, and deleted, since this worker started
    written_bytes: Count = 0  # to files, since this worker started: KV, records, logs, and files rewritten


_TAGS = {cls: tag for tag, cls in REGISTRY.items()}
