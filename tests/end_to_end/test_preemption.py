"""Working KV for fewer turns than run: those that give way are saved, come back from the store, and nobody sees it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.stack import running_stack
from tests.inference.harness import Reference, make_model

_TURNS = 3


def test_preempted_turns_come_back_from_the_store(tmp_path: Path) -> None:
    """Two turns of each conversation, all at once: transformers' own answers, and the second finds all of the first."""
    model = make_model(tmp_path / "model", "llama", max_context=768, seed=3, end_token=259)
    reference = Reference(model)
    excused = 0
    with running_stack(
        model,
        dtype="float32",
        working_kv="2300KB",
        retain=0,
        chunk_tokens=32,
        dram="64MiB",
        ssd=0,
        load_or_compute="load",
    ) as stack:
        conversations = [[{"role": "user", "content": f"{i} " * 120}] for i in range(_TURNS)]

        history, computed = [0] * _TURNS, 0
        for answer_tokens in (150, 10):

            def ask(messages: list[dict[str, Any]], answer_tokens: int = answer_tokens) -> dict[str, Any]:
                return stack.chat(messages, max_tokens=answer_tokens)

            with ThreadPoolExecutor(_TURNS) as pool:
                answers = list(pool.map(ask, conversations))
            stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
            for i, answer in enumerate(answers):
                prompt, choice, usage = answer["prompt_token_ids"], answer["choices"][0], answer["usage"]
                excused += reference.check(prompt, choice["token_ids"])
                account = usage["cachedattention"]
                assert not account["missed"]
                assert account["hbm"] + account["dram"] >= history[i]
                assert account["hbm"] + account["dram"] + account["computed"] == len(prompt)
                computed += account["computed"]
                history[i] = len(prompt) + len(choice["token_ids"]) - 1
                conversations[i].append({"role": "assistant", "content": choice["message"]["content"]})
                conversations[i].append({"role": "user", "content": "And?"})
        metrics = stack.metrics("inference")
    assert excused <= 1
    preemptions = metrics["cachedattention_preemptions_total"]
    assert preemptions > 0
    assert metrics["cachedattention_working_kv_bytes"] <= metrics["cachedattention_working_kv_capacity_bytes"] == 2.3e6
    # A turn that came back without the store would have computed its prompt of 240 tokens again.
    again = metrics['cachedattention_engine_step_tokens_total{phase="prefill"}'] - computed
    assert preemptions <= again < preemptions * 32
