"""Stand-ins for inference and kvdaemon on the real ZeroMQ protocol: tokens at a set pace, without a model.

They cost next to nothing, so that what is measured is the gateway.
"""

from __future__ import annotations

import argparse
import asyncio

from protocol.ids import Message, digest, pack_tokens, turn_key
from protocol.messages import (
    Ack,
    Anticipate,
    GetModel,
    ModelInfo,
    QueueOrder,
    RunTurn,
    TurnDelta,
    TurnDone,
    TurnStarted,
    TurnUsage,
)
from protocol.rpc import Call, RpcServer

MODEL = "stand-in"
_WORD = "word "
_PREFILL_S = 0.01  # from a turn's start to its first token: a small model's, with its history in place


class StandIn:
    def __init__(self, endpoint: str, gap_s: float) -> None:
        """gap_s: between tokens."""
        self._gap_s = gap_s
        self._model = ModelInfo(MODEL, digest("bench", b"m"), digest("bench", b"t"), 1 << 20, max_running=4096)
        self.server = RpcServer(endpoint, "inference", {GetModel: self._get_model, RunTurn: self._run_turn})

    async def _get_model(self, call: Call, message: GetModel) -> ModelInfo:
        return self._model

    async def _run_turn(self, call: Call, turn: RunTurn) -> TurnDone:
        prompt = sum(len(message.content) for message in turn.messages) // 4
        count = turn.sampling.max_tokens
        await call.send(TurnStarted(prompt))
        for number in range(count):
            await asyncio.sleep(self._gap_s if number else _PREFILL_S)
            await call.send(TurnDelta(_WORD, pack_tokens([number])))
        text = _WORD * count
        hit = min(turn.parent_tokens, prompt)
        return TurnDone(
            "length",
            turn_key(turn.request_key, Message("assistant", text)),
            text,
            pack_tokens(range(count)),
            TurnUsage(prompt, count, dram=hit, computed=prompt - hit),
        )


async def _acknowledge(call: Call, message: QueueOrder | Anticipate) -> Ack:
    return Ack()


async def main(inference: str, kvdaemon: str, gap_s: float) -> None:
    await StandIn(inference, gap_s).server.start()
    await RpcServer(kvdaemon, "kvdaemon", {QueueOrder: _acknowledge, Anticipate: _acknowledge}).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inference", required=True)
    parser.add_argument("--kvdaemon", required=True)
    parser.add_argument("--gap-s", type=float, required=True)
    given = parser.parse_args()
    asyncio.run(main(given.inference, given.kvdaemon, given.gap_s))
