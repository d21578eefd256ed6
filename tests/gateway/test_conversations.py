"""/v1/conversations over real HTTP: OpenAI's routes by the official client, and what operators and users need."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, eventually, journaled


def ask(served: ServedGateway, method: str, path: str, body: Any = None, token: str = "sk-test") -> dict[str, Any]:
    """A request that must succeed, by the same tenant as `served.openai()`."""
    headers = {"Authorization": f"Bearer {token}"}
    reply = httpx.request(method, f"{served.url}/v1/conversations{path}", json=body, headers=headers, timeout=30.0)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def talk(client: OpenAI, *texts: str) -> list[str]:
    """Turns that continue one another. Returns the ids of the conversation and of its responses."""
    conversation = client.conversations.create().id
    return [
        conversation,
        *(client.responses.create(model=MODEL, input=text, conversation=conversation).id for text in texts),
    ]


def test_create_retrieve_update_delete(served: ServedGateway) -> None:
    with served.openai() as client:
        made = client.conversations.create(metadata={"topic": "tea"})
        assert made.object == "conversation"
        assert client.conversations.retrieve(made.id).metadata == {"topic": "tea"}
        changed = client.conversations.update(made.id, metadata={"topic": "coffee"})
        assert (changed.id, changed.metadata, changed.created_at) == (made.id, {"topic": "coffee"}, made.created_at)
        response = client.responses.create(model=MODEL, input="x", conversation=made.id)
        assert served.metric("conversations") == 1
        gone = client.conversations.delete(made.id)
        assert (gone.id, gone.deleted, gone.object) == (made.id, True, "conversation.deleted")
        for call in (client.conversations.retrieve, client.conversations.delete, client.conversations.items.list):
            with pytest.raises(NotFoundError):
                call(made.id)
        with pytest.raises(NotFoundError):
            client.responses.retrieve(response.id)
    assert journaled(served.data_dir) == []
    assert served.metric("conversations") == 0


def test_items(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, first, _ = talk(client, "one", "two")
        added = client.conversations.items.create(
            conversation, items=[{"type": "message", "role": "user", "content": "by the way"}]
        )
        assert len(added.data) == 1
        newest = client.conversations.items.list(conversation, limit=2)
        assert newest.data[0].id == added.data[0].id
        items = list(client.conversations.items.list(conversation, order="asc", limit=2))
        assert [item.type for item in items] == ["message"] * 5
        one = client.conversations.items.retrieve(items[1].id, conversation_id=conversation)
        assert one.content[0].text == "You said: one ✓"  # type: ignore[union-attr]
        client.conversations.items.delete(items[0].id, conversation_id=conversation)
        with pytest.raises(NotFoundError):
            client.conversations.items.retrieve(items[0].id, conversation_id=conversation)
        with pytest.raises(NotFoundError):
            client.conversations.items.delete(items[0].id, conversation_id=conversation)
        with pytest.raises(BadRequestError):
            client.conversations.items.list(conversation, after="msg_none")
        client.responses.create(model=MODEL, input="three", conversation=conversation)
        assert client.responses.retrieve(first).output_text == "You said: one ✓"
    said = [message.content for message in served.peer.turns[-1].messages]
    assert said == ["You said: one ✓", "two", "You said: two ✓", "by the way", "three"]


def test_the_list_is_by_last_use_and_has_titles(served: ServedGateway) -> None:
    """Also conversations of stateless clients; and in pages."""
    with served.openai() as client:
        first, *_ = talk(client, "tell me\n about   tea", "more")
        second, *_ = talk(client, "x" * 200)
        served.chat("stateless", token="sk-test")
        client.responses.create(model=MODEL, input="again", conversation=first)
        served.chat("another tenant", token="sk-other")
        client.responses.create(model=MODEL, input="not stored", store=False)
    found = ask(served, "GET", "")
    assert [one["title"] for one in found["data"]] == ["tell me about tea", "stateless", "x" * 80]
    assert (found["data"][0]["turns"], found["has_more"]) == (3, False)
    assert found["data"][0]["tokens"] > found["data"][1]["tokens"] > 0
    assert found["data"][2]["id"] == second
    page = ask(served, "GET", "?limit=2")
    assert page["has_more"]
    rest = ask(served, "GET", f"?limit=2&after={page['last_id']}")
    assert [one["id"] for one in page["data"] + rest["data"]] == [one["id"] for one in found["data"]]
    assert [one["id"] for one in ask(served, "GET", "?order=asc")["data"]] == [o["id"] for o in found["data"][::-1]]


def test_rename_pin_and_time_to_live(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, *_ = talk(client, "one")
    renamed = ask(served, "POST", f"/{conversation}", {"title": "Tea"})
    assert (renamed["title"], renamed["pinned"], renamed["expires_at"]) == ("Tea", False, None)
    mortal = ask(served, "POST", f"/{conversation}", {"ttl_s": 3600})
    assert (mortal["title"], mortal["ttl_s"]) == ("Tea", 3600)
    assert 3590 < mortal["expires_at"] - time.time() < 3610
    assert ask(served, "POST", f"/{conversation}", {"pinned": True})["expires_at"] is None
    assert ask(served, "POST", f"/{conversation}", {"ttl_s": 0, "pinned": False})["ttl_s"] is None


def test_what_is_over_is_erased_and_what_is_pinned_is_kept(served: ServedGateway) -> None:
    with served.openai() as client:
        over, *_ = talk(client, "over")
        pinned, *_ = talk(client, "pinned")
        alive, *_ = talk(client, "alive")
    ask(served, "POST", f"/{over}", {"ttl_s": 100})
    ask(served, "POST", f"/{pinned}", {"ttl_s": 100, "pinned": True})
    ask(served, "POST", f"/{alive}", {"ttl_s": 10_000})
    keys = [turn.turn_key for turn in journaled(served.data_dir)]
    sweep = served.gateway._retention.sweep
    assert served.call(sweep(time.time())) == 0
    assert served.call(sweep(time.time() + 1000)) == 1
    assert served.daemon.erased == keys[:1]
    assert {one["id"] for one in ask(served, "GET", "")["data"]} == {pinned, alive}
    assert [hint.turn_key for hint in served.daemon.anticipated] == [keys[1]] * 2
    assert not any(hint.fetch for hint in served.daemon.anticipated)


def test_turns_are_a_tree_with_their_sources(served: ServedGateway) -> None:
    """What a page needs: branches, and for each turn where its prompt came from."""
    with served.openai() as client:
        conversation, first, second = talk(client, "one", "two")
        again = client.responses.create(model=MODEL, input="two", previous_response_id=first)
    found = ask(served, "GET", f"/{conversation}/turns")
    turns = {turn["id"]: turn for turn in found["data"]}
    assert [turn["id"] for turn in found["data"]] == [first, second, again.id]
    assert [turn["parent_id"] for turn in found["data"]] == [None, first, first]
    assert turns[second]["input"][0]["content"][0]["text"] == "two"
    assert turns[second]["response"]["output"][0]["content"][0]["text"] == "You said: two ✓"
    usage = turns[second]["response"]["usage"]
    ours = usage["cachedattention"]
    assert ours["dram"] + ours["computed"] == usage["input_tokens"]
    assert ours["dram"] > 0
    assert ours["ttft_s"] > 0
    # The second answer to one question shares all of its prompt with the first.
    assert turns[again.id]["response"]["usage"]["cachedattention"]["dram"] == usage["input_tokens"]


def test_a_fork_goes_its_own_way(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, first, _ = talk(client, "one", "two")
        fork = ask(served, "POST", f"/{conversation}/fork", {"response_id": first, "title": "Fork"})
        assert (fork["title"], fork["turns"]) == ("Fork", 1)
        answer = client.responses.create(model=MODEL, input="other", conversation=fork["id"])
        assert [m.content for m in served.peer.turns[-1].messages] == ["one", "You said: one ✓", "other"]
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.cached_tokens > 0
        whole = ask(served, "POST", f"/{conversation}/fork")
        assert (whole["title"], whole["turns"]) == ("one", 2)
        client.conversations.delete(conversation)
        assert len(list(client.conversations.items.list(fork["id"]))) == 4
        assert len(list(client.conversations.items.list(whole["id"]))) == 4
    reply = httpx.post(f"{served.url}/v1/conversations/{fork['id']}/fork", json={"response_id": first}, timeout=30.0)
    assert reply.status_code == 404


def test_anticipate_tells_the_store(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, *_ = talk(client, "one")
        empty = client.conversations.create().id
    assert ask(served, "POST", f"/{conversation}/anticipate", {"in_s": 2})["told"]
    (hint,) = served.daemon.anticipated
    assert (hint.turn_key, hint.in_s, hint.fetch) == (journaled(served.data_dir)[0].turn_key, 2.0, True)
    assert not ask(served, "POST", f"/{empty}/anticipate")["told"]


def test_cache_says_where_the_kv_lies(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, first, second = talk(client, "one", "two")
    found = ask(served, "GET", f"/{conversation}/cache")
    assert (found["dram"], found["ssd"], found["in_use"]) == ({"bytes": 20}, {"bytes": 40}, False)
    assert [turn["id"] for turn in found["turns"]] == [second, first]
    assert found["turns"][0] == {"id": second, "context": 8, "saved": 8, "dram": 4, "ssd": 8, "last_hit_at": 1}
    assert found["prompt_tokens"]["dram"] > 0
    assert sum(found["prompt_tokens"].values()) == sum(t.prompt_tokens or 0 for t in journaled(served.data_dir))


def test_erase_gives_a_receipt_for_every_tier(served: ServedGateway) -> None:
    """And nothing is left of it in the journal's files."""
    with served.openai() as client:
        conversation, *_ = talk(client, "a secret word", "two")
        kept, *_ = talk(client, "kept")
    keys = [turn.turn_key for turn in journaled(served.data_dir)][:2]
    receipt = ask(served, "POST", f"/{conversation}/erase")
    assert served.daemon.erased == keys[::-1]  # what continues the others goes first
    assert receipt["complete"]
    assert receipt["journal"] == {"turns": 2}
    assert served.peer.forgotten == keys[::-1]
    assert receipt["hbm"] == {"contexts": 2, "bytes": 20}
    assert receipt["dram"] == {"chunks": 4, "bytes": 40, "wiped_bytes": 60, "deferred_slots": 0}
    assert receipt["ssd"] == {"chunks": 4, "bytes": 80, "manifests": 2}
    assert receipt["turn_keys"] == [key.hex() for key in keys[::-1] if key]
    for name in ("journal.sqlite", "journal.sqlite-wal"):
        assert b"a secret word" not in (served.data_dir / name).read_bytes()
    assert [one["id"] for one in ask(served, "GET", "")["data"]] == [kept]


def test_a_receipt_tells_of_a_device_that_was_not_reached(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, *_ = talk(client, "one")
    served.call(served.peer.server.stop())
    receipt = ask(served, "POST", f"/{conversation}/erase")
    assert not receipt["complete"]
    assert receipt["hbm"] == {"contexts": 0, "bytes": 0}
    assert [sentence.split(",")[0] for sentence in receipt["left"]] == ["on the device of inference"]
    assert journaled(served.data_dir) == []


def test_what_is_erased_is_no_answer_to_a_request_that_comes_again(served: ServedGateway) -> None:
    """The answers that are kept for an Idempotency-Key go, too."""
    with served.openai() as client:
        ids = []
        for _ in range(2):
            made = client.responses.create(model=MODEL, input="one", extra_headers={"Idempotency-Key": "k"})
            ids.append(made.id)
        assert ids[0] == ids[1]
        conversation = client.responses.retrieve(ids[0]).model_dump()["cachedattention"]["conversation"]
        ask(served, "POST", f"/{conversation}/erase")
        again = client.responses.create(model=MODEL, input="one", extra_headers={"Idempotency-Key": "k"})
    assert again.id != ids[0]
    assert len(served.peer.turns) == 2


def test_a_fork_keeps_what_it_shares(served: ServedGateway) -> None:
    """Contexts that another conversation names too are not erased."""
    with served.openai() as client:
        conversation, first, _ = talk(client, "one", "two")
        ask(served, "POST", f"/{conversation}/fork", {"response_id": first})
    ask(served, "POST", f"/{conversation}/erase")
    (left,) = journaled(served.data_dir)
    assert left.turn_key not in served.daemon.erased
    assert len(served.daemon.erased) == 1


def test_without_the_store_nothing_is_erased(directory: Path) -> None:
    served = ServedGateway(directory, daemon=False)
    try:
        with served.openai() as client:
            conversation, *_ = talk(client, "one")
        reply = httpx.post(
            f"{served.url}/v1/conversations/{conversation}/erase",
            headers={"Authorization": "Bearer sk-test"},
            timeout=30.0,
        )
        assert reply.status_code == 503, reply.text
        assert len(journaled(served.data_dir)) == 1
        assert not ask(served, "POST", f"/{conversation}/anticipate")["told"]
    finally:
        served.close()


def test_export_has_everything(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, *_ = talk(client, "one", "two")
    found = ask(served, "GET", f"/{conversation}/export")
    assert found["conversation"]["id"] == conversation
    said = [
        item["content"][0]["text"] for turn in found["turns"] for item in turn["input"] + turn["response"]["output"]
    ]
    assert said == ["one", "You said: one ✓", "two", "You said: two ✓"]


def test_another_tenant_has_no_way_in(served: ServedGateway) -> None:
    with served.openai() as client:
        conversation, *_ = talk(client, "one")
    for method, path in [
        ("GET", ""),
        ("POST", ""),
        ("DELETE", ""),
        ("GET", "/items"),
        ("GET", "/turns"),
        ("GET", "/cache"),
        ("GET", "/export"),
        ("POST", "/fork"),
        ("POST", "/anticipate"),
        ("POST", "/erase"),
    ]:
        url = f"{served.url}/v1/conversations/{conversation}{path}"
        reply = httpx.request(method, url, json={}, headers={"Authorization": "Bearer sk-other"}, timeout=30.0)
        assert reply.status_code == 404, (method, path, reply.text)
    assert ask(served, "GET", "", token="sk-other")["data"] == []


def test_a_turn_of_a_stateless_client_is_a_response_too(served: ServedGateway) -> None:
    """Whatever API it came by, a turn can be read, continued and forked by its id."""
    answer = served.chat("one", token="sk-test")["choices"][0]["message"]["content"]
    served.chat("one", answer, "two", token="sk-test")
    one, two = journaled(served.data_dir)
    with served.openai() as client:
        assert client.responses.retrieve(f"resp_{two.id.hex()}").output_text == two.answer
        client.responses.create(model=MODEL, input="three", previous_response_id=f"resp_{two.id.hex()}")
    assert len(served.peer.turns[-1].messages) == 5
    assert eventually(lambda: journaled(served.data_dir)[-1].parent_id) == two.id
    assert one.conversation_id == two.conversation_id
