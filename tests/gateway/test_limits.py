"""What tenants may use: buckets beside plain arithmetic, and limits over HTTP: 429 that tells when to come again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api_keys import ApiKey, ApiKeys, digest_of
from gateway.limits import Bucket, Limits, Meter, Meters, RateLimited
from protocol.errors import ConfigError
from protocol.ids import tenant_namespace
from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, eventually, talk

KEYS = ApiKeys(
    tuple(
        ApiKey(name=name, sha256=digest_of(name), tenant=name) for name in ("few", "talks", "small", "early", "free")
    ),
    {
        "few": Limits(requests_per_minute=2),
        "talks": Limits(tokens_per_minute=60),
        "small": Limits(stored_bytes=1000),
        "early": Limits(priority=-10),
    },
)


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 100), st.floats(0, 300)), max_size=30))
def test_a_bucket_gives_no_more_than_its_rate(per_minute: int, asked: list[tuple[float, float]]) -> None:
    """Taking only what wait_s allows, nobody gets more than one fill and what came in since; waiting so long helps."""
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, 0.0
    for pause, amount in asked:
        now += pause
        wait = bucket.wait_s(amount, now)
        if not wait:
            bucket.take(min(amount, per_minute), now)
            taken += min(amount, per_minute)
        else:
            assert bucket.wait_s(amount, now + wait) == pytest.approx(0, abs=1e-6)
            assert bucket.wait_s(amount, now + wait / 2) > 0
        assert taken <= per_minute * (1 + now / 60) + 1e-6


def test_a_meter_settles_what_it_foresaw() -> None:
    meter = Meter(Limits(tokens_per_minute=100), 0.0)
    meter.admit(30, 0.0)
    meter.settle(30, prompt=80, cached=70, completion=40, now_s=0.0)  # 20 more than a minute has
    with pytest.raises(RateLimited) as refused:
        meter.admit(10, 0.0)
    assert refused.value.retry_after_s == pytest.approx(30 * 60 / 100)
    meter.admit(10, 18.01)
    assert (meter.requests, meter.refused) == (2, 1)
    assert (meter.prompt_tokens, meter.cached_tokens, meter.completion_tokens) == (80, 70, 40)


def test_what_was_refused_costs_nothing_and_a_huge_prompt_waits_for_a_full_minute() -> None:
    meter = Meter(Limits(requests_per_minute=1, tokens_per_minute=100), 0.0)
    meter.admit(10_000, 0.0)
    meter.take_back(10_000, 0.0)
    meter.admit(10, 0.0)
    for _ in range(3):
        with pytest.raises(RateLimited):
            meter.admit(10, 30.0)
    meter.admit(10_000, 60.1)


def test_meters_of_tenants_without_limits_are_bounded() -> None:
    meters = Meters(unlimited=2)
    kept = meters.of(b"kept", Limits(requests_per_minute=1), 0.0)
    for number in range(5):
        meters.of(bytes([number]), Limits(), 0.0)
    assert meters.of(b"kept", Limits(requests_per_minute=1), 0.0) is kept
    assert {tenant for tenant, _ in meters} == {b"kept", b"\x03", b"\x04"}


@pytest.mark.parametrize(
    "values",
    [{"requests_per_minute": 0}, {"tokens_per_minute": -1}, {"stored_bytes": -1}, {"priority": 101}],
)
def test_impossible_limits_stop_the_start(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Limits(**values)


# -- over HTTP -----------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(directory: Path) -> Iterator[ServedGateway]:
    gateway = ServedGateway(directory, api_keys=KEYS)
    yield gateway
    gateway.close()


def _ask(gateway: ServedGateway, token: str, text: str = "hi", **fields: object) -> httpx.Response:
    body = {"model": MODEL, "messages": talk(text), **fields}
    return gateway.post(body, headers={"Authorization": f"Bearer {token}"})


def test_requests_per_minute(limited: ServedGateway) -> None:
    for _ in range(2):
        assert _ask(limited, "few").status_code == 200
    reply = _ask(limited, "few")
    assert reply.status_code == 429
    assert (reply.json()["error"]["type"], reply.json()["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 25 <= int(reply.headers["retry-after"]) <= 30
    assert _ask(limited, "free").status_code == 200
    assert len(limited.peer.turns) == 3


def test_tokens_per_minute(limited: ServedGateway) -> None:
    assert _ask(limited, "talks", "[length 80]").status_code == 200  # foreseen 3 tokens, took about 100
    reply = _ask(limited, "talks", "x")
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) > 20


def test_beyond_its_bytes_a_tenants_turns_run_and_are_not_stored(limited: ServedGateway) -> None:
    assert _ask(limited, "small").status_code == 200
    namespace = tenant_namespace(limited.peer.model.namespace, limited.peer.turns[0].tenant_salt)
    for stored, save in ((999, True), (1000, False), (0, True)):
        limited.daemon.stored[namespace] = stored
        limited.call(limited.gateway._quotas.measure())
        assert _ask(limited, "small").status_code == 200
        assert limited.peer.turns[-1].save == save
    assert all(turn.save for turn in limited.peer.turns if turn.tenant_salt != limited.peer.turns[0].tenant_salt)


def test_priorities_are_for_those_who_may_have_them(limited: ServedGateway) -> None:
    assert _ask(limited, "early", priority=-10).status_code == 200
    for token, priority in (("early", -11), ("free", -1)):
        reply = _ask(limited, token, priority=priority)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "priority")
    assert _ask(limited, "free", priority=5).status_code == 200
    orders = [turn.order >> 40 for turn in limited.peer.turns]
    assert orders == [90, 105]
    tiers = {}
    for tier in ("auto", "flex", "priority"):
        tiers[tier] = _ask(limited, "free", service_tier=tier).json()["service_tier"]
    assert tiers == {"auto": "default", "flex": "flex", "priority": "default"}
    assert "service_tier" not in _ask(limited, "free").json()


def test_retry_after_of_a_full_queue_is_what_turns_take(directory: Path) -> None:
    """One turn runs and one waits, on one place, where turns took 7.2 s lately: both are to end first."""
    gateway = ServedGateway(directory, max_running=1, queue_limit=1)
    try:
        gateway.gateway._dispatcher._turn_s = 7.2
        gateway.set_hold(True)
        with ThreadPoolExecutor(2) as pool:
            replies = [pool.submit(gateway.chat, "x") for _ in range(2)]
            eventually(lambda: gateway.metric("queue_depth") == 1)
            reply = gateway.post({"model": MODEL, "messages": talk("x")})
            gateway.set_hold(False)
            for running in replies:
                running.result(30.0)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= math.ceil(2 * 7.2)
    finally:
        gateway.close()
