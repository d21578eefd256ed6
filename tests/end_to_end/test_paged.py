"""Working KV in pages, as on CUDA: history is saved and comes back, and answers are transformers' own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.stack import running_stack
from tests.inference.harness import Reference, make_model

_CONVERSATIONS = 3
_ANSWERS = (330, 20, 20)


def test_turns_in_pages_are_saved_and_come_back(tmp_path: Path) -> None:
    """Three turns of each conversation, in room for one long one, with nothing retained: all history is loaded."""
    model = make_model(tmp_path / "model", "llama", max_context=1024, seed=3, end_token=259)
    reference = Reference(model)
    excused = 0
    with running_stack(
        model,
        dtype="float32",
        paged=1,
        working_kv="4MB",
        retain=0,
        chunk_tokens=32,
        dram="64MiB",
        ssd=0,
        load_or_compute="load",
    ) as stack:
        conversations = [[{"role": "user", "content": f"{i} " * 120}] for i in range(_CONVERSATIONS)]
        history, hits = [0] * _CONVERSATIONS, {"hbm": 0, "dram": 0}
        for answer_tokens in _ANSWERS:

            def ask(messages: list[dict[str, Any]], answer_tokens: int = answer_tokens) -> dict[str, Any]:
                return stack.chat(messages, max_tokens=answer_tokens)

            with ThreadPoolExecutor(_CONVERSATIONS) as pool:
                answers = list(pool.map(ask, conversations))
            stack.wait_metric("inference", "cachedattention_save_backlog", 0.0)
            for i, answer in enumerate(answers):
                prompt, choice, account = (
                    answer["prompt_token_ids"],
                    answer["choices"][0],
                    answer["usage"]["cachedattention"],
                )
                excused += reference.check(prompt, choice["token_ids"])
                assert not account["missed"]
                for tier in hits:
                    hits[tier] += account[tier]
                assert sum(account[tier] for tier in hits) >= history[i]
                history[i] = len(prompt) + len(choice["token_ids"]) - 1
                conversations[i].append({"role": "assistant", "content": choice["message"]["content"]})
                conversations[i].append({"role": "user", "content": "And?"})
        metrics = stack.metrics("inference")
    assert excused <= 1
    assert hits["dram"] > 0
    assert metrics["cachedattention_preemptions_total"] > 0
