"""`cachedattention size`: the arithmetic against a simulation of the same load, and the command."""

from __future__ import annotations

import json
import random

import pytest

from cli.size import Load, plan_size, token_bytes
from protocol.errors import ConfigError
from tests.cli.running import cli

CHAT = Load(conversations_per_hour=3600, turns=6, turn_tokens=100, think_s=30.0, dram_share=0.9, keep_s=600.0)


def simulate(load: Load, seed: int, conversations: int) -> tuple[float, float, float]:
    """Token seconds that DRAM, in slots of 256, and SSD hold for each conversation; the share that DRAM serves."""

    def slots(turns: int) -> int:
        return -(-turns * load.turn_tokens // 256) * 256

    draw = random.Random(seed)
    held_s = plan_size(load, 1, 10**9, 256).held_s
    dram = ssd = served = 0.0
    for _ in range(conversations):
        for turn in range(1, load.turns):
            think_s = draw.expovariate(1 / load.think_s)
            served += think_s <= held_s
            dram += slots(turn) * min(think_s, held_s)
            ssd += turn * load.turn_tokens * think_s
        dram += slots(load.turns) * held_s
        ssd += load.turns * load.turn_tokens * load.keep_s
    return dram / conversations, ssd / conversations, served / conversations / (load.turns - 1)


def test_sizes_are_what_a_simulated_load_holds() -> None:
    """One conversation begins each second, so that what is held is a conversation's token seconds."""
    dram, ssd, served = simulate(CHAT, seed=7, conversations=4000)
    need = plan_size(CHAT, token_bytes=10, max_context=10**9, chunk_tokens=256)
    assert need.dram_bytes == pytest.approx(10 * dram, rel=0.02)
    assert need.ssd_bytes * 0.94 == pytest.approx(10 * ssd, rel=0.02)
    assert served == pytest.approx(CHAT.dram_share, abs=0.01)


def test_sizes_by_hand() -> None:
    """Two turns, the second fills the context."""
    load = Load(conversations_per_hour=7200, turns=2, turn_tokens=60, think_s=10.0, dram_share=0.5, keep_s=100.0)
    need = plan_size(load, token_bytes=1000, max_context=100, chunk_tokens=20)
    assert need.context_tokens == 100
    assert need.held_s == pytest.approx(6.931, abs=1e-3)
    assert need.between_turns == 20
    assert need.dram_bytes == pytest.approx(2 * 1000 * (10 * 0.5 * 60 + 6.931 * 100), rel=1e-3)
    assert need.ssd_bytes == pytest.approx(2 * 1000 * (10 * 60 + 100 * 100) / 0.94, rel=1e-6)
    assert need.ssd_written_bytes_per_day == 2 * 86_400 * 1000 * (100 + 2 * 10)


def test_a_tokens_bytes_are_read_from_the_model() -> None:
    llama = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    assert token_bytes(llama | {"torch_dtype": "bfloat16"}, "auto") == 131_072
    assert token_bytes({"text_config": llama | {"head_dim": 64}}, "float32") == 131_072
    with pytest.raises(ConfigError, match="num_attention_heads"):
        token_bytes({}, "auto")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"turns": 0}, "turns"),
        ({"think_s": float("nan")}, "think_s"),
        ({"dram_share": 1.0}, "dram_share"),
        ({"keep_s": -1.0}, "keep_s"),
    ],
)
def test_impossible_loads_are_refused(change: dict[str, float], key: str) -> None:
    values = {"conversations_per_hour": 1.0, "turns": 1, "turn_tokens": 1, "think_s": 1.0} | change
    with pytest.raises(ConfigError) as refused:
        Load(**values)  # type: ignore[arg-type]
    assert refused.value.param == key


def test_the_command_prints_the_plan() -> None:
    """For people with a line to copy, as JSON with the same figures; a model that is not here is a clear error."""
    options = ("size", "--conversations-per-hour", "1000")
    said = cli(*options).stdout.decode()
    assert "cachedattention up --dram 1GiB" in said
    found = json.loads(cli(*options, "--json", "--kv-bytes-per-token", "131072").stdout)
    load = Load(1000, 8, 400, 60.0)
    assert found["dram_bytes"] == plan_size(load, 131_072, 131_072, 256).dram_bytes
    refused = cli(*options, "--model", "owner/name")
    assert refused.returncode == 2
    assert b"give --kv-bytes-per-token" in refused.stderr
