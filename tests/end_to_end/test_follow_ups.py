"""A follow-up may come at any moment of its parent's save, and finds all of its history."""

from __future__ import annotations

from benchmarks.stack import running_stack

_PAIRS = 80


def test_a_follow_up_during_the_save_misses_nothing() -> None:
    """Nothing is retained on the device: each finds its history in the write buffer, in the store, or on the way."""
    found = {"hbm": 0, "dram": 0}
    with running_stack("embedded", dtype="float32", retain=0, dram="64MiB", ssd=0, load_or_compute="load") as stack:
        for number in range(_PAIRS):
            messages = [{"role": "user", "content": f"My sister Anna {number} lives in Rome."}]
            first = stack.chat(messages, max_tokens=20, temperature=1.2, seed=number)
            messages.append({"role": "assistant", "content": first["choices"][0]["message"]["content"]})
            messages.append({"role": "user", "content": "Where does Anna live?"})
            usage = stack.chat(messages, max_tokens=2)["usage"]["cachedattention"]
            assert usage["missed"] == {}, f"pair {number}"
            for tier in found:
                found[tier] += usage[tier] > 0
    assert sum(found.values()) == _PAIRS
    assert found["dram"] > 0
