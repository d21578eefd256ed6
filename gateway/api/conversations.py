"""/v1/conversations: OpenAI's routes, and beside them what people who run and use them need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from gateway.api.body import read_body
from gateway.api.errors import JsonResponse
from gateway.api.items import (
    MAX_ITEMS,
    InputItem,
    Item,
    input_items,
    output_items,
    page,
    parse_item_id,
    to_messages,
)
from gateway.api.lists import Listed, listed
from gateway.api.openapi import json_answer, json_body
from gateway.api.parsing import Metadata, Strict, parse_body
from gateway.api.response import Response as ResponseObject
from gateway.api.response import conversation_name, of_journal, response_id
from gateway.api.responses import parse_id
from gateway.journal.conversations import Changes, Conversations, NotFound, Summary
from gateway.journal.tables import Turn
from gateway.retention import Receipt, Retention
from gateway.tenants import Tenant, Tenants
from gateway.workers import Workers

Order = Literal["asc", "desc"]
Limit = Annotated[int, Query(ge=1, le=100)]
_LONGEST_TTL_S = 10 * 365 * 86_400


class CreateConversation(Strict):
    items: Annotated[list[InputItem], Field(max_length=MAX_ITEMS)] | None = None
    metadata: Metadata | None = None


class UpdateConversation(Strict):
    """What is left out stays as it is. ttl_s: seconds after its last turn; 0: for ever."""

    metadata: Metadata | None = None
    title: Annotated[str, Field(max_length=1000)] | None = None
    pinned: bool | None = None
    ttl_s: Annotated[float, Field(ge=0, le=_LONGEST_TTL_S)] | None = None


class CreateItems(Strict):
    items: Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]


class ForkConversation(Strict):
    """response_id: the last turn that the fork has; left out: the newest."""

    response_id: Annotated[str, Field(max_length=64)] | None = None
    title: Annotated[str, Field(max_length=1000)] | None = None


class AnticipateTurn(Strict):
    in_s: Annotated[float, Field(ge=0, le=3600)] = 5.0


class Conversation(TypedDict):
    """OpenAI's fields first. tokens: of the longest context; turns: that were answered, on all branches."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]
    title: str | None
    model: str
    updated_at: int
    pinned: bool
    ttl_s: float | None
    expires_at: int | None
    turns: int
    tokens: int


class DeletedConversation(TypedDict):
    id: str
    object: Literal["conversation.deleted"]
    deleted: bool


class ConversationTurn(TypedDict):
    """A turn of the tree: what was said, and what was answered from where. parent_id: null at the beginning."""

    id: str
    object: Literal["conversation.turn"]
    parent_id: str | None
    created_at: int
    input: list[Item]
    response: ResponseObject | None  # null: messages that a client added by themselves


class TierShare(TypedDict):
    bytes: int


class TurnCache(TypedDict):
    """In tokens. last_hit_at: when the store handed it out last, as far as it remembers."""

    id: str
    context: int
    saved: int
    dram: int
    ssd: int
    last_hit_at: int | None


class ConversationCache(TypedDict):
    """Where a conversation's KV lies, and what it has saved: prompt tokens by source, of all its turns."""

    object: Literal["conversation.cache"]
    id: str
    tokens: int
    dram: TierShare
    ssd: TierShare
    in_use: bool
    prompt_tokens: dict[str, int]
    missed_tokens: dict[str, int]
    turns: list[TurnCache]


class Anticipated(TypedDict):
    """told: whether there is a context to fetch, and the store heard of it."""

    object: Literal["conversation.anticipated"]
    id: str
    told: bool


class JournalErased(TypedDict):
    turns: int


class HbmErased(TypedDict):
    contexts: int
    bytes: int


class DramErased(TypedDict):
    chunks: int
    bytes: int
    wiped_bytes: int
    deferred_slots: int


class SsdErased(TypedDict):
    chunks: int
    bytes: int
    manifests: int


class ErasedConversation(TypedDict):
    """A receipt. shared_chunks: kept, for others need them; left: what may still be somewhere, in words; complete says
    that it is empty; notes: on files of the journal's database, which nobody reads but by its own tools."""

    object: Literal["conversation.erased"]
    id: str
    complete: bool
    journal: JournalErased
    hbm: HbmErased
    dram: DramErased
    ssd: SsdErased
    turn_keys: list[str]
    shared_chunks: int
    leases_revoked: int
    left: list[str]
    notes: list[str]


class Export(TypedDict):
    object: Literal["conversation.export"]
    conversation: Conversation
    turns: list[ConversationTurn]


def conversations_router(
    conversations: Conversations, retention: Retention, workers: Workers, tenants: Tenants, max_body_bytes: int
) -> APIRouter:
    router = APIRouter(prefix="/v1/conversations", tags=["Conversations"])

    def tenant_of(request: Request) -> Tenant:
        return tenants.identify(request.headers.get("authorization"))

    # -- OpenAI's ---------------------------------------------------------------------------------------------

    @router.post("", openapi_extra=json_body(CreateConversation, required=False), responses=json_answer(Conversation))
    async def create_conversation(request: Request) -> Response:
        tenant = tenant_of(request)
        asked = parse_body(await read_body(request, max_body_bytes), CreateConversation, optional=True)
        messages = to_messages(asked.items or ())
        made = await conversations.create(tenant.id, workers.model.model, asked.metadata or {}, messages)
        retention.created()
        return JsonResponse(_conversation(made))

    @router.get("/{conversation_id}", responses=json_answer(Conversation))
    async def retrieve_conversation(request: Request, conversation_id: str) -> Response:
        found = await conversations.get(tenant_of(request).id, parse_id("conv", conversation_id))
        return JsonResponse(_conversation(found))

    @router.post("/{conversation_id}", openapi_extra=json_body(UpdateConversation), responses=json_answer(Conversation))
    async def update_conversation(request: Request, conversation_id: str) -> Response:
        """Rename, pin, give a time to live, set metadata."""
        tenant = tenant_of(request)
        asked = parse_body(await read_body(request, max_body_bytes), UpdateConversation)
        changes = Changes(asked.title, asked.metadata, asked.pinned, asked.ttl_s)
        return JsonResponse(
            _conversation(await conversations.change(tenant.id, parse_id("conv", conversation_id), changes))
        )

    @router.delete("/{conversation_id}", responses=json_answer(DeletedConversation))
    async def delete_conversation(request: Request, conversation_id: str) -> Response:
        """With its responses, from the journal. Its KV can be found by nobody, and goes when room is needed."""
        await retention.delete(tenant_of(request).id, parse_id("conv", conversation_id))
        return JsonResponse(DeletedConversation(id=conversation_id, object="conversation.deleted", deleted=True))

    @router.get("/{conversation_id}/items", responses=json_answer(Listed[Item]))
    async def list_items(
        request: Request, conversation_id: str, limit: Limit = 20, after: str | None = None, order: Order = "desc"
    ) -> Response:
        """What was said up to the newest turn; of other branches see /turns."""
        path = await conversations.path(tenant_of(request).id, parse_id("conv", conversation_id))
        return JsonResponse(page(_said(path), limit, after, order))

    @router.post("/{conversation_id}/items", openapi_extra=json_body(CreateItems), responses=json_answer(Listed[Item]))
    async def create_items(request: Request, conversation_id: str) -> Response:
        tenant = tenant_of(request)
        asked = parse_body(await read_body(request, max_body_bytes), CreateItems)
        turn = await conversations.add(tenant.id, parse_id("conv", conversation_id), to_messages(asked.items))
        return JsonResponse(page(input_items(turn), MAX_ITEMS, None, "asc"))

    @router.get("/{conversation_id}/items/{item_id}", responses=json_answer(Item))
    async def retrieve_item(request: Request, conversation_id: str, item_id: str) -> Response:
        turns = await conversations.turns(tenant_of(request).id, parse_id("conv", conversation_id))
        for item in _said(turns):
            if item["id"] == item_id:
                return JsonResponse(item)
        raise NotFound("this conversation has no such item")

    @router.delete("/{conversation_id}/items/{item_id}", responses=json_answer(Conversation))
    async def delete_item(request: Request, conversation_id: str, item_id: str) -> Response:
        """A call of a function goes with the message that it is a part of."""
        turn_id, index = parse_item_id(item_id)
        tenant = tenant_of(request)
        found = await conversations.delete_message(tenant.id, parse_id("conv", conversation_id), turn_id, index)
        return JsonResponse(_conversation(found))

    # -- ours -------------------------------------------------------------------------------------------------

    @router.get("", responses=json_answer(Listed[Conversation]))
    async def list_conversations(
        request: Request, limit: Limit = 20, after: str | None = None, order: Order = "desc"
    ) -> Response:
        """By last use."""
        start = None if after is None else parse_id("conv", after)
        found, more = await conversations.list(tenant_of(request).id, limit, start, order)
        return JsonResponse(listed([_conversation(one) for one in found], more))

    @router.get("/{conversation_id}/turns", responses=json_answer(Listed[ConversationTurn]))
    async def list_turns(request: Request, conversation_id: str) -> Response:
        """The whole tree, oldest first: siblings are answers made anew, and questions asked differently."""
        turns = await conversations.turns(tenant_of(request).id, parse_id("conv", conversation_id))
        return JsonResponse(listed([_turn(turn, workers.model.model) for turn in turns]))

    @router.get("/{conversation_id}/cache", responses=json_answer(ConversationCache))
    async def inspect_cache(request: Request, conversation_id: str) -> Response:
        tenant, wanted = tenant_of(request), parse_id("conv", conversation_id)
        summary = await conversations.get(tenant.id, wanted)
        turns = await conversations.turns(tenant.id, wanted)
        return JsonResponse(await _cache(summary, turns, retention))

    @router.post(
        "/{conversation_id}/fork",
        openapi_extra=json_body(ForkConversation, required=False),
        responses=json_answer(Conversation),
    )
    async def fork_conversation(request: Request, conversation_id: str) -> Response:
        """A conversation of its own that goes on from a turn of this one. Its KV is shared."""
        tenant = tenant_of(request)
        asked = parse_body(await read_body(request, max_body_bytes), ForkConversation, optional=True)
        turn_id = None if asked.response_id is None else parse_id("resp", asked.response_id)
        made = await conversations.fork(tenant.id, parse_id("conv", conversation_id), turn_id, asked.title)
        retention.created()
        return JsonResponse(_conversation(made))

    @router.post(
        "/{conversation_id}/anticipate",
        openapi_extra=json_body(AnticipateTurn, required=False),
        responses=json_answer(Anticipated),
    )
    async def anticipate_turn(request: Request, conversation_id: str) -> Response:
        """Somebody is typing: its KV is brought from SSD to DRAM before the turn comes."""
        tenant = tenant_of(request)
        asked = parse_body(await read_body(request, max_body_bytes), AnticipateTurn, optional=True)
        told = await retention.anticipate(tenant.id, parse_id("conv", conversation_id), asked.in_s)
        return JsonResponse(Anticipated(object="conversation.anticipated", id=conversation_id, told=told))

    @router.get("/{conversation_id}/export", responses=json_answer(Export))
    async def export_conversation(request: Request, conversation_id: str) -> Response:
        """All that the journal has of it."""
        tenant, wanted = tenant_of(request), parse_id("conv", conversation_id)
        summary = await conversations.get(tenant.id, wanted)
        turns = await conversations.turns(tenant.id, wanted)
        body = Export(
            object="conversation.export",
            conversation=_conversation(summary),
            turns=[_turn(turn, workers.model.model) for turn in turns],
        )
        return JsonResponse(body, headers={"Content-Disposition": f'attachment; filename="{conversation_id}.json"'})

    @router.post("/{conversation_id}/erase", responses=json_answer(ErasedConversation))
    async def erase_conversation(request: Request, conversation_id: str) -> Response:
        """From devices, DRAM, SSD and the journal, with a receipt. On SSD files are rewritten; it may take minutes."""
        receipt = await retention.erase(tenant_of(request).id, parse_id("conv", conversation_id))
        return JsonResponse(_erased(conversation_id, receipt))

    return router


def _said(turns: Sequence[Turn]) -> list[Item]:
    return [item for turn in turns for item in (*input_items(turn), *output_items(turn))]


def _conversation(summary: Summary) -> Conversation:
    found = summary.conversation
    lives = found.ttl_s is not None and not found.pinned
    return {
        "id": conversation_name(found.id),
        "object": "conversation",
        "created_at": int(found.created_at_s),
        "metadata": found.labels or {},
        "title": found.title,
        "model": found.model,
        "updated_at": int(found.updated_at_s),
        "pinned": found.pinned,
        "ttl_s": found.ttl_s,
        "expires_at": int(found.updated_at_s + (found.ttl_s or 0)) if lives else None,
        "turns": summary.turns,
        "tokens": summary.tokens,
    }


def _turn(turn: Turn, model: str) -> ConversationTurn:
    is_note = turn.status == "done" and not turn.usage
    return {
        "id": response_id(turn.id),
        "object": "conversation.turn",
        "parent_id": response_id(turn.parent_id) if turn.parent_id else None,
        "created_at": int(turn.created_at_s),
        "input": input_items(turn),
        "response": None if is_note else of_journal(turn, model),
    }


async def _cache(summary: Summary, turns: Sequence[Turn], retention: Retention) -> ConversationCache:
    answered = [turn for turn in turns if turn.turn_key and turn.usage]
    newest_first = list(reversed(answered))
    found = await retention.describe([turn.turn_key for turn in newest_first if turn.turn_key])
    sources: Counter[str] = Counter(hbm=0, dram=0, ssd=0, computed=0)
    missed: Counter[str] = Counter()
    for turn in answered:
        usage: dict[str, Any] = turn.usage or {}
        sources.update({name: usage[name] for name in sources})
        missed.update(usage["missed"])
    return {
        "object": "conversation.cache",
        "id": conversation_name(summary.conversation.id),
        "tokens": summary.tokens,
        "dram": {"bytes": found.dram_bytes},
        "ssd": {"bytes": found.ssd_bytes},
        "in_use": found.leases > 0,
        "prompt_tokens": dict(sources),
        "missed_tokens": dict(missed),
        "turns": [
            {
                "id": response_id(turn.id),
                "context": place.kv_tokens,
                "saved": place.stored_tokens,
                "dram": place.dram_tokens,
                "ssd": place.ssd_tokens,
                "last_hit_at": int(place.last_hit_s) or None,
            }
            for turn, place in zip(newest_first, found.turns, strict=False)
        ],
    }


def _erased(conversation_id: str, receipt: Receipt) -> ErasedConversation:
    return {
        "object": "conversation.erased",
        "id": conversation_id,
        "complete": not receipt.left,
        "journal": {"turns": receipt.turns},
        "hbm": {"contexts": receipt.hbm_contexts, "bytes": receipt.hbm_bytes},
        "dram": {
            "chunks": receipt.dram_chunks,
            "bytes": receipt.dram_bytes,
            "wiped_bytes": receipt.wiped_bytes,
            "deferred_slots": receipt.deferred_slots,
        },
        "ssd": {"chunks": receipt.ssd_chunks, "bytes": receipt.ssd_bytes, "manifests": receipt.ssd_manifests},
        "turn_keys": [key.hex() for key in receipt.turn_keys],
        "shared_chunks": receipt.shared_chunks,
        "leases_revoked": receipt.leases_revoked,
        "left": receipt.left,
        "notes": receipt.notes,
    }
