"""The account of a prompt: every token is a hit in a tier, new, or missed for a reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.context import History, Known, account, account_chunks, known_history, wanted_chunks, worth_taking
from protocol import ids
from protocol.messages import Manifest, SlotRef

NAMESPACE = b"n" * 16
CHUNK = 16


def manifest(tokens: np.ndarray, kv_tokens: int) -> Manifest:
    chain = ids.lineage(NAMESPACE, tokens[:kv_tokens].astype(np.uint32), CHUNK)
    return Manifest(bytes(16), NAMESPACE, ids.pack_tokens(tokens), "", tuple(chain), kv_tokens)


@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.integers(1, CHUNK), st.sampled_from(["dram", "ssd"])), max_size=40),
    st.integers(0, 600),
    st.sampled_from(["", "text_changed", "manifest_lost"]),
)
def test_parts_add_up(prompt: int, chunks: list[tuple[int, str]], known: int, reason: str) -> None:
    refs = [SlotRef(i, 1, bytes(16), tokens, tier) for i, (tokens, tier) in enumerate(chunks)]  # type: ignore[arg-type]
    history = account_chunks(refs, prompt)
    assert history.tokens == history.dram + history.ssd <= prompt - 1
    usage = account(prompt, 1, history, Known(min(known, prompt - 1), reason), "evicted")
    parts = (usage.hbm, usage.dram, usage.ssd, usage.computed, *usage.missed.values())
    assert sum(parts) == prompt
    assert min(parts) >= 0


@given(
    st.integers(40, 500),
    st.lists(st.sampled_from(["dram", "ssd"]), min_size=1, max_size=20),
    st.integers(0, 20),
    st.integers(0, 600),
)
def test_what_was_computed_instead_of_loaded_has_its_reason(
    prompt: int, tiers: list[str], computed_chunks: int, known: int
) -> None:
    """The computed front is no hit; what of it was known is missed for that reason, and the rest for its own."""
    refs = [SlotRef(i, 1, bytes(16), CHUNK, tier) for i, tier in enumerate(tiers)]  # type: ignore[arg-type]
    stored = account_chunks(refs, prompt)
    computed = min(computed_chunks * CHUNK, stored.tokens)
    history = account_chunks(refs, prompt, computed)
    assert history.tokens == history.dram + history.ssd == stored.tokens - computed
    usage = account(prompt, 1, history, Known(min(known, prompt - 1)), "evicted", computed)
    cheaper = usage.missed.get("computing_was_cheaper", 0)
    assert history.tokens + usage.computed + sum(usage.missed.values()) == prompt
    assert cheaper == min(computed, max(0, min(known, prompt - 1) - history.tokens))
    assert usage.missed.get("evicted", 0) == max(0, min(known, prompt - 1) - max(stored.tokens, history.tokens))


def test_a_continued_context_asks_for_its_partial_chunk() -> None:
    context = np.arange(40, dtype=np.uint32)
    parent = manifest(context, 39)
    prompt = np.concatenate([context, np.arange(100, 120, dtype=np.uint32)])
    wanted = wanted_chunks(NAMESPACE, prompt, parent, True, CHUNK)
    assert wanted.chunk_ids == tuple(ids.lineage(NAMESPACE, prompt[:48], CHUNK))
    assert wanted.partial_index == 2
    assert wanted.partial_id == parent.chunk_ids[2]


@pytest.mark.parametrize("changed", [0, 16, 35])
def test_a_changed_context_asks_for_the_chunk_in_which_it_leaves_the_other(changed: int) -> None:
    """KV of a chunk's first tokens is as good in a branch: all before the change is reused, not whole chunks only."""
    context = np.arange(60, dtype=np.uint32)
    parent = manifest(context, 59)
    prompt = context.copy()
    prompt[changed:] += 1000
    wanted = wanted_chunks(NAMESPACE, prompt, parent, False, CHUNK)
    held = [SlotRef(i, 1, parent.chunk_ids[i], CHUNK, "dram") for i in range(changed // CHUNK)]
    if changed % CHUNK:
        assert (wanted.partial_id, wanted.partial_index) == (parent.chunk_ids[2], 2)
        held.append(SlotRef(2, 1, parent.chunk_ids[2], CHUNK, "dram"))
    else:
        assert wanted.partial_id is None
    assert wanted.reach(held) == changed
    assert account_chunks(held, wanted.reach(held) + 1).tokens == changed


def test_the_same_question_again_shares_all_but_its_last_token() -> None:
    context = np.arange(60, dtype=np.uint32)
    wanted = wanted_chunks(NAMESPACE, context[:40], manifest(context, 59), False, CHUNK)
    assert (wanted.partial_index, wanted.partial_tokens) == (2, 7)


def test_a_changed_context_is_told_where() -> None:
    """Of a branch only what it may share is known; of a parent all that it left behind."""
    context = np.arange(60, dtype=np.uint32)
    prompt = np.concatenate([context[:35], np.arange(100, 200, dtype=np.uint32)])
    known = known_history(prompt, manifest(context, 59), False, 59, "")
    assert known == Known(59, "text_changed", "first difference at token 35")
    assert known_history(prompt, manifest(context, 59), False, 30, "") == Known(30)
    usage = account(len(prompt), 1, History(32, dram=32), known, "evicted", explained={"corrupt": "not this"})
    assert usage.missed == {"text_changed": 27}
    assert usage.explained == {"text_changed": "first difference at token 35"}


def test_a_reason_that_the_gateway_knows_is_told() -> None:
    known = known_history(np.arange(100, dtype=np.uint32), None, False, 80, "model_changed")
    assert account(100, 1, History(), known, "").missed == {"model_changed": 80}


def test_last_token_is_never_history() -> None:
    """An equal prompt computes its last token anew, so the partial chunk that covers it is not asked for."""
    context = np.arange(40, dtype=np.uint32)
    wanted = wanted_chunks(NAMESPACE, context, manifest(context, 40), True, CHUNK)
    assert wanted.partial_id is None
    assert account_chunks([SlotRef(0, 1, bytes(16), 40, "dram")], 40) == History(39, 0, 39, 0)


def test_lost_manifest_is_counted_by_the_journals_figure() -> None:
    prompt = np.arange(100, dtype=np.uint32)
    assert known_history(prompt, None, False, 80, "manifest_lost") == Known(80, "manifest_lost")
    assert known_history(prompt, None, False, 0, "manifest_lost") == Known(0)
    assert known_history(prompt, None, False, 500, "manifest_lost").tokens == 99


def test_another_conversations_first_words_are_not_worth_taking() -> None:
    """retained, prompt, known: what decides is whose it is, and else how much of the prompt or of a chunk it saves."""
    assert not worth_taking(1, 300, 0, 256)
    assert not worth_taking(1, 300, 200, 256)
    assert worth_taking(200, 300, 200, 256)  # its own
    assert worth_taking(1, 300, 1, 256)
    assert worth_taking(256, 3000, 0, 256)
    assert worth_taking(256, 3000, 2000, 256)  # the store may have more, which counts then
    assert worth_taking(90, 100, 0, 256)  # the same question again
    assert not worth_taking(40, 100, 0, 256)
