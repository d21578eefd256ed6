"""A stand-in for the inference process, on the real transport. What it does is written in the last message.

Its tokens are the bytes of UTF-8 and one end token, so that everything about an answer can be known beforehand. It
remembers the contexts it served as a real one does: the part of a prompt that a parent turn left behind is a hit.

    "tell me X"                     answers with `answer_to(messages)`, a token at a time
    "... [say X]"                   answers X
    "... [slow 0.05] ..."           waits so many seconds before each token
    "... [length N] ..."            answers N letters
    "... [fail CODE] ..."           refuses with that error before it starts
    "... [going S] ..."             is on its way out: gives turns up for the first S seconds, still connected
    "... [break N] ..."             fails with an internal error after N tokens
    "... [unsure] ..."              leaves the log probabilities that were asked for out
    "... [dropped N] ..."           has lost the first N tokens of its context
    "... [bytes] ..."               ends its answer with a byte that is no UTF-8
    "... [die N] ..."               kills its own process after N tokens, unless it is told to resume
    "... [die-once N FILE] ..."     the same, only while FILE is not there; makes it
    "... [bad-key] ...", "[bad-sum]", "[bad-text]", "[unstarted]"   break a promise of the protocol
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol.errors import Cancelled, InvalidRequest, PeerUnavailable, from_wire
from protocol.ids import Message, digest, new_id, pack_tokens, turn_key, unpack_tokens
from protocol.messages import (
    Ack,
    Anticipate,
    ChatMessage,
    DescribeTurns,
    Detokenize,
    Detokenized,
    Erase,
    ErasureReceipt,
    ForgetTurns,
    GetModel,
    MeasureNamespaces,
    ModelInfo,
    NamespacesMeasured,
    QueueOrder,
    RunTurn,
    SampledLogprobs,
    Tokenize,
    Tokenized,
    TokenLogprob,
    TurnDelta,
    TurnDone,
    TurnPlace,
    TurnsDescribed,
    TurnsForgotten,
    TurnStarted,
    TurnUsage,
)
from protocol.rpc import Call, RpcServer

END = 256
MODEL = "scripted-1"


def render(messages: Sequence[ChatMessage]) -> list[int]:
    """The prompt's tokens."""
    return list("".join(f"<{m.role}>{m.content}" for m in messages).encode())


def answer_to(messages: Sequence[ChatMessage]) -> bytes:
    """The whole answer, before any limit."""
    asked = messages[-1].content
    if match := re.search(r"\[length (\d+)\]", asked):
        return b"abcdefghij"[: int(match[1])].ljust(int(match[1]), b"z")
    if match := re.search(r"\[say (.*)\]$", asked, re.DOTALL):
        return match[1].encode()
    plain = re.sub(r" ?\[.*?\]", "", asked)
    said = f"You said: {plain} ✓".encode()
    return said + b"\xff" if "[bytes]" in asked else said


def logprobs_of(token: int, top: int) -> SampledLogprobs:
    """What a token is reported with; the alternatives are the letters from A on."""
    sampled = TokenLogprob(b"" if token == END else bytes([token]), -token / 100, "<end>" * (token == END))
    return SampledLogprobs(sampled, tuple(TokenLogprob(bytes([65 + i]), -float(i)) for i in range(top)))


class ScriptedInference:
    """In a loop of the test's process, or as a process of its own by `main`."""

    def __init__(self, endpoint: str, max_running: int = 4, weights: bytes = b"weights") -> None:
        self.model = ModelInfo(
            MODEL, digest("test", weights), digest("test", b"template"), 4096, max_running, tool_format="hermes"
        )
        self.turns: list[RunTurn] = []
        self.forgotten: list[bytes] = []
        self._first_turn_s = 0.0
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self.hold = asyncio.Event()  # cleared: turns start, and sample nothing
        self.hold.set()
        self.is_leaving = False  # refuses turns, still connected
        handlers = {
            GetModel: self._get_model,
            RunTurn: self._run_turn,
            Tokenize: self._tokenize,
            Detokenize: self._detokenize,
            ForgetTurns: self._forget_turns,
        }
        self.server = RpcServer(endpoint, "inference", handlers)

    def _since_first_turn_s(self) -> float:
        return time.monotonic() - self._first_turn_s

    async def _get_model(self, call: Call, message: GetModel) -> ModelInfo:
        return self.model

    async def _tokenize(self, call: Call, asked: Tokenize) -> Tokenized:
        tokens = render(asked.messages) if asked.messages else list(asked.text.encode())
        return Tokenized(pack_tokens(tokens), tuple(map(chr, tokens)) if asked.want_strings else ())

    async def _detokenize(self, call: Call, asked: Detokenize) -> Detokenized:
        tokens = unpack_tokens(asked.tokens).tolist()
        if max(tokens, default=0) > 255:
            raise InvalidRequest(f"there is no token {max(tokens)}", param="tokens")
        return Detokenized(bytes(tokens).decode("utf-8", "replace"))

    async def _forget_turns(self, call: Call, message: ForgetTurns) -> TurnsForgotten:
        """Every context has 10 bytes."""
        self.forgotten += message.turn_keys
        return TurnsForgotten(len(message.turn_keys), 10 * len(message.turn_keys))

    async def _run_turn(self, call: Call, turn: RunTurn) -> TurnDone:
        if not self.turns:
            self._first_turn_s = time.monotonic()
        self.turns.append(turn)
        if self.is_leaving:
            raise PeerUnavailable("as scripted")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._answer(call, turn)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, call: Call, turn: RunTurn) -> TurnDone:
        asked = turn.messages[-1].content
        if match := re.search(r"\[fail (\w+)\]", asked):
            raise from_wire(match[1], "as scripted", "messages" if "context" in match[1] else None)
        if (match := re.search(r"\[going ([\d.]+)\]", asked)) and self._since_first_turn_s() < float(match[1]):
            raise Cancelled("as scripted")
        prompt = render(turn.messages) if turn.prompt is None else list(turn.prompt.text.encode())
        if "[unstarted]" not in asked:
            await call.send(TurnStarted(len(prompt)))
        await self.hold.wait()
        whole = answer_to(turn.messages)
        finish_reason = "stop"
        tokens = [*whole, END]
        if turn.sampling.max_tokens and turn.sampling.max_tokens < len(tokens):
            tokens, finish_reason = tokens[: turn.sampling.max_tokens], "length"
        pause = re.search(r"\[slow ([\d.]+)\]", asked)
        broken = re.search(r"\[break (\d+)\]", asked)
        resumed = len(unpack_tokens(turn.resume_tokens))
        for at in range(resumed, len(tokens)):
            if pause:
                await asyncio.sleep(float(pause[1]))
            if broken and at >= int(broken[1]):
                raise RuntimeError("as scripted")
            _maybe_die(asked, at, resumed)
            text = _final_text(tokens, at + 1, len(tokens))[len(_final_text(tokens, at, len(tokens))) :]
            logprobs, settled = (), 0
            if turn.sampling.logprobs is not None and "[unsure]" not in asked:
                logprobs = (logprobs_of(tokens[at], turn.sampling.logprobs),)
                settled = len(_final_text(tokens, at + 1, len(tokens)).encode())
            await call.send(TurnDelta(text, pack_tokens(tokens[at : at + 1]), logprobs, settled))
        text = _final_text(tokens, len(tokens), len(tokens))
        if "[bad-text]" in asked:
            text = "never streamed"
        key = turn_key(turn.request_key, Message("assistant", text))
        hit = min(turn.parent_tokens, len(prompt))
        usage = TurnUsage(len(prompt), len(tokens), dram=hit, computed=len(prompt) - hit + ("[bad-sum]" in asked))
        return TurnDone(
            finish_reason,
            new_id() if "[bad-key]" in asked else key,
            text,
            pack_tokens(tokens),
            usage,
            pack_tokens(prompt) if turn.return_prompt_tokens else b"",
            prefill_s=0.001,
            settled=len(tokens) - (tokens[-1] == END),
            **_dropped(asked, len(prompt) + len(tokens)),
        )


def _dropped(asked: str, said: int) -> dict[str, Any]:
    match = re.search(r"\[dropped (\d+)\]", asked)
    return {"dropped_tokens": int(match[1]), "kept": ((int(match[1]), said),)} if match else {}


def _final_text(tokens: Sequence[int], upto: int, total: int) -> str:
    """The text that is final after `upto` tokens: a character that is not whole waits for its rest."""
    raw = bytes(token for token in tokens[:upto] if token != END)
    if upto == total:
        return raw.decode("utf-8", "replace")
    for cut in range(len(raw), max(-1, len(raw) - 4), -1):
        try:
            return raw[:cut].decode()
        except UnicodeDecodeError:
            continue
    return ""


def _maybe_die(asked: str, at: int, resumed: int) -> None:
    die = re.search(r"\[die (\d+)\]", asked)
    once = re.search(r"\[die-once (\d+) (\S+)\]", asked)
    if die and at == int(die[1]) and not resumed:
        os.kill(os.getpid(), signal.SIGKILL)
    if once and at == int(once[1]) and not Path(once[2]).exists():
        Path(once[2]).touch()
        os.kill(os.getpid(), signal.SIGKILL)


class RecordingDaemon:
    """A stand-in for kvdaemon that notes the hints, and what is erased; every context has 2 chunks of 10 bytes."""

    def __init__(self, endpoint: str) -> None:
        self.orders: list[tuple[bytes, ...]] = []
        self.anticipated: list[Anticipate] = []
        self.erased: list[bytes] = []
        self.stored: dict[bytes, int] = {}  # bytes by namespace
        handlers = {
            QueueOrder: self._queue_order,
            Anticipate: self._anticipate,
            MeasureNamespaces: self._measure,
            DescribeTurns: self._describe_turns,
            Erase: self._erase,
        }
        self.server = RpcServer(endpoint, "kvdaemon", handlers)

    async def _describe_turns(self, call: Call, message: DescribeTurns) -> TurnsDescribed:
        turns = tuple(TurnPlace(key, 8, 8, 4, 8, 1.5) for key in message.turn_keys)
        return TurnsDescribed(turns, 10 * len(turns), 20 * len(turns), 0)

    async def _erase(self, call: Call, message: Erase) -> ErasureReceipt:
        if message.turn_key in self.erased:
            raise InvalidRequest("no such turn")
        self.erased.append(message.turn_key)
        chunks = (new_id(), new_id())
        return ErasureReceipt((message.turn_key,), chunks, 20, 30, chunks, 40, 1, 100, 50, 0, 0, 0)

    async def _queue_order(self, call: Call, message: QueueOrder) -> Ack:
        self.orders.append(message.turn_keys)
        return Ack()

    async def _anticipate(self, call: Call, message: Anticipate) -> Ack:
        self.anticipated.append(message)
        return Ack()

    async def _measure(self, call: Call, message: MeasureNamespaces) -> NamespacesMeasured:
        return NamespacesMeasured(tuple(self.stored.get(namespace, 0) for namespace in message.namespaces))


async def main(endpoint: str, max_running: int) -> None:
    await ScriptedInference(endpoint, max_running).server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--max-running", type=int, default=4)
    given = parser.parse_args()
    asyncio.run(main(given.endpoint, given.max_running))
