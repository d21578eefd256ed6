"""Loaders: the recorded files as they are, and what is not such a file."""

from __future__ import annotations

import gzip
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulator.names import Format
from benchmarks.simulator.traces import Trace, load, repeat

AGENTIC: dict[str, Any] = {
    "id": "a",
    "block_size": 64,
    "requests": [
        {"type": "n", "t": 0.0, "in": 700, "out": 30, "think_time": 0, "stop": "tool_use", "keep": 0, "add": [[0, 10]]},
        {
            "type": "n",
            "t": 9.0,
            "in": 900,
            "out": 40,
            "think_time": 2.5,
            "stop": "end_turn",
            "keep": 10,
            "add": [[10, 4]],
        },
        {
            "type": "subagent",
            "t": 11.0,
            "requests": [
                {"type": "s", "t": 0.0, "in": 640, "out": 9, "stop": "tool_use", "keep": 0, "add": [[0, 8], [90, 2]]}
            ],
        },
        {"type": "n", "t": 20.0, "in": 530, "out": 5, "think_time": 4.0, "stop": "end_turn", "keep": 8, "add": []},
    ],
}
MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 52, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 1536, "output_length": 7, "hash_ids": [0, 1, 3]},
]
TEXT = [
    {
        "id": "t",
        "messages": [
            {"role": "system", "content": "s" * 400},
            {"role": "user", "content": "u" * 400},
            {"role": "assistant", "content": "a" * 1000},
            {"role": "user", "content": "u" * 40},
            {"role": "assistant", "content": None},
        ],
    },
    {"id": "no answer", "messages": [{"role": "user", "content": "?"}]},
]
RECORDS: dict[Format, list[dict[str, Any]]] = {"agentic": [AGENTIC], "mooncake": MOONCAKE, "text": TEXT}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def check(trace: Trace) -> None:
    """What every trace promises to the replay."""
    for requests in trace.conversations:
        assert [request.number for request in requests] == list(range(len(requests)))
        assert requests[0].at_s is not None
        for request in requests:
            size = trace.chunk_tokens
            assert len(request.chain) == -(-request.chain_tokens // size)
            assert len(request.left) == -(-request.left_tokens // size)
            assert request.whole == request.left_tokens // size
            assert request.chain_tokens <= request.prompt_tokens <= request.left_tokens
            assert len(set(request.left)) == len(request.left)
            assert {len(chunk_id) for chunk_id in request.left} <= {16}
    starts = [requests[0].at_s or 0.0 for requests in trace.conversations]
    assert starts == sorted(starts)


def test_agentic(tmp_path: Path) -> None:
    """Blocks become chunks of whole blocks; a sub-agent is a conversation of its own that shares what is equal."""
    trace = load(write(tmp_path / "trace", [AGENTIC]), "agentic", rate=1.0, seed=1, chunk_tokens=300)
    check(trace)
    assert trace.chunk_tokens == 256
    main, sub = trace.conversations
    assert [r.prompt_tokens for r in main] == [700, 900, 530]
    assert [r.whole for r in main] == [2, 3, 2]
    assert [r.next_speaker for r in main] == ["tool", "person", "person"]
    assert [r.after_s for r in main] == [0.0, 2.5, 4.0]
    assert main[1].chain[:2] == main[0].chain[:2] == main[2].chain[:2] == sub[0].chain[:2]
    assert main[1].chain[2] not in main[0].chain  # there it was partial
    assert sub[0].at_s == pytest.approx((main[0].at_s or 0.0) + 11.0)


def test_agentic_conversations_share_nothing(tmp_path: Path) -> None:
    """Block ids are local to a conversation."""
    trace = load(write(tmp_path / "trace.gz", [AGENTIC, AGENTIC]), "agentic", rate=1.0, seed=1)
    chunks = [{c for request in requests for c in request.left} for requests in trace.conversations]
    by_parts = sorted(chunks, key=len)
    assert not by_parts[-1] & by_parts[-2]


def test_mooncake(tmp_path: Path) -> None:
    """Hashes are global: equal ones are the same chunk, whoever asks."""
    trace = load(write(tmp_path / "trace.gz", MOONCAKE), "mooncake", rate=1.0, seed=1)
    check(trace)
    first, second = (requests[0] for requests in trace.conversations)
    assert (trace.chunk_tokens, first.whole, second.whole) == (512, 2, 3)
    assert first.left[:2] == second.left[:2]
    assert (first.at_s, second.at_s, second.prompt_tokens, second.answer_tokens) == (0.0, 3.0, 1536, 7)


def test_text(tmp_path: Path) -> None:
    """A turn leaves its answer behind too, and the next one looks for exactly that."""
    trace = load(write(tmp_path / "trace", TEXT), "text", rate=1.0, seed=1)
    check(trace)
    (requests,) = trace.conversations
    assert [(r.prompt_tokens, r.answer_tokens) for r in requests] == [(200, 250), (460, 1)]
    assert [r.chain_tokens for r in requests] == [0, 450]
    assert requests[1].chain == requests[0].left


def test_arrivals_are_of_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "trace", [AGENTIC] * 5)
    loaded = [load(path, "agentic", rate=0.1, seed=seed) for seed in (1, 1, 2)]
    assert loaded[0] == loaded[1]
    assert loaded[0] != loaded[2]


def test_repeat(tmp_path: Path) -> None:
    """Drawn conversations are as long as their originals, share chunks within but not with one another."""
    trace = repeat(load(write(tmp_path / "trace", TEXT), "text", rate=1.0, seed=1), 20, rate=2.0, seed=3)
    check(trace)
    assert len(trace.conversations) == 20
    assert all(requests[1].chain == requests[0].left for requests in trace.conversations)
    chunks = [{c for request in requests for c in request.left} for requests in trace.conversations]
    assert sum(map(len, chunks)) == len(set().union(*chunks))
    starts = [requests[0].at_s or 0.0 for requests in trace.conversations]
    gaps = [later - before for before, later in zip([0.0, *starts], starts, strict=False)]
    assert 0.2 < sum(gaps) / len(gaps) < 1.0
    assert list(accumulate(gaps)) == pytest.approx(starts)


@pytest.mark.parametrize("format", ["agentic", "mooncake", "text"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"not json\n",
        b"[1, 2]\n",
        b"17\n",
        b"null\n",
        b'{"other": 1}\n',
        b'{"messages": [{"role": "user"}], "requests": 3, "block_size": 64, "hash_ids": "x", "input_length": "y"}\n',
        b'{"messages": 3, "requests": [{}], "block_size": 0, "hash_ids": [-1], "input_length": 1, "timestamp": 0}\n',
        b"\xff\xfe\x00",
        b"\x1f\x8b",
    ],
)
@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_is_no_trace(tmp_path: Path, format: Format, content: bytes, name: str) -> None:
    """Whatever the file holds, it is one error that names the file."""
    path = tmp_path / name
    path.write_bytes(
        content if name.endswith("jsonl") else gzip.compress(content) if content[:1] != b"\x1f" else content
    )
    with pytest.raises(ValueError, match=r"trace\.jsonl"):
        load(path, format, rate=1.0, seed=1)


@pytest.mark.parametrize("format", ["agentic", "mooncake", "text"])
def test_one_format_is_not_another(tmp_path: Path, format: Format) -> None:
    others: list[Format] = [other for other in ("agentic", "mooncake", "text") if other != format]
    path = write(tmp_path / "trace", RECORDS[format])
    for other in others:
        with pytest.raises(ValueError, match=other):
            load(path, other, rate=1.0, seed=1)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("traces/agentic_claude_code", "agentic"),
        ("traces/mooncake_conversation", "mooncake"),
        ("traces/mooncake_synthetic", "mooncake"),
        ("text/wildchat", "text"),
        ("text/tau_bench", "text"),
        ("text/mt_eval", "text"),
    ],
)
def test_recorded_files(tmp_path: Path, name: str, format: Format) -> None:
    """The first lines of the files as their publishers wrote them."""
    path = Path(__file__).parents[3] / "shared" / "data" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        first = tmp_path / "first.jsonl"
        first.write_text("".join(line for _, line in zip(range(20), file, strict=False)), encoding="utf-8")
    trace = load(first, format, rate=1.0, seed=1)
    assert trace.requests >= 20
    check(trace)
