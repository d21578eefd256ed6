#!/usr/bin/env python3
"""One more turn of a conversation that lives in a file; fails where the history was not reused. Standard library only.

    turn.py URL STATE.json [--from TIER] TEXT

Reused means: cached_tokens >= prompt + generated - 1 of the turn before. With --from, tokens must have come from that
tier, and none from the working KV.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

_ANSWER_TOKENS = 24


def ask(url: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    body = {"model": "embedded", "messages": messages, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("state", type=Path)
    parser.add_argument("--from", dest="tier", choices=["dram", "ssd"])
    parser.add_argument("text")
    arguments = parser.parse_args()

    state = json.loads(arguments.state.read_text()) if arguments.state.exists() else {"messages": [], "reusable": 0}
    messages = [*state["messages"], {"role": "user", "content": arguments.text}]
    started = time.monotonic()
    answer = ask(arguments.url, messages)
    seconds = time.monotonic() - started

    usage = answer["usage"]
    cached, sources = usage["prompt_tokens_details"]["cached_tokens"], usage["cachedattention"]
    print(
        f"turn {len(messages) // 2 + 1}: prompt {usage['prompt_tokens']}, cached {cached}"
        f" of {state['reusable']} reusable, hbm {sources['hbm']}, dram {sources['dram']}, ssd {sources['ssd']},"
        f" computed {sources['computed']}, {seconds:.2f} s"
    )
    if cached < state["reusable"]:
        print(f"history was computed again: {sources['missed']}", file=sys.stderr)
        return 1
    if arguments.tier and (not sources[arguments.tier] or sources["hbm"]):
        print(f"history did not come from {arguments.tier}", file=sys.stderr)
        return 1
    state["messages"] = [*messages, {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}]
    state["reusable"] = usage["prompt_tokens"] + usage["completion_tokens"] - 1
    arguments.state.write_text(json.dumps(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
