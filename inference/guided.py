"""Answers that follow a JSON schema: which tokens may come next. The grammar is llguidance's."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits

from inference.vocabulary import Vocabulary
from protocol.errors import InternalError, InvalidRequest

PARAM = "response_format"

# A compilation cannot be stopped, but llguidance's own limits end it: the worst schemas we know take 0.13 s of CPU.
# They bound the work of each later step, too.
_DEADLINE_S = 10.0
_LIMITS = LLParserLimits(verbose_errors=False)  # its words go to clients
# Without a bound a small model may write white space for ever; this much is a line break and a deep indentation.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
_TRIAL_TOKENS = 2
_CACHED = 32  # schemas; clients send the same one with every turn


class Guide:
    """Follows one answer, token by token. Owned by one thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        """The answer is complete and nothing may follow it but an end token."""
        return self._matcher.is_stopped()

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Which tokens may come next; end tokens where the answer may end.  # [vocabulary] bool

        Raises InvalidRequest: the schema has become too complex to follow.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise _refusal(self._matcher)
        mask = np.zeros(vocabulary, dtype=bool)
        bits = np.unpackbits(packed, count=min(vocabulary, 8 * len(packed)), bitorder="little")
        mask[: len(bits)] = bits
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """`token` was chosen. Raises InternalError: it is not allowed. InvalidRequest: as `allowed`."""
        if not self._matcher.try_consume_tokens([token]):
            if self._matcher.is_error():
                raise _refusal(self._matcher)
            raise InternalError(f"token {token} does not follow the schema")


class Guides:
    """Compiles schemas for one model, off the event loop, and remembers the latest. Owned by one loop."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    async def guide(self, schema: str) -> Guide:
        """A guide for an answer that `schema`, a JSON schema as JSON, allows.

        Raises InvalidRequest: it is no schema, uses what is not supported, or is too large or slow to compile.
        """
        matcher = self._compiled.get(schema)
        if matcher is None:
            try:
                matcher = await asyncio.wait_for(asyncio.to_thread(self._compile, schema), _DEADLINE_S)
            except TimeoutError as error:
                raise InvalidRequest(f"the schema does not compile in {_DEADLINE_S:g} s", param=PARAM) from error
            self._compiled[schema] = matcher
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(schema)
        return Guide(matcher.deep_copy())

    def _compile(self, schema: str) -> LLMatcher:
        try:
            trie = self._vocabulary.trie()
        except ValueError as error:
            raise InvalidRequest(f"this model's tokenizer cannot follow schemas: {error}", param=PARAM) from error
        try:
            # Ours last, so that a schema's own "x-guidance" does not undo it.
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise InvalidRequest(f"the schema cannot be read: {_reason(str(error))}", param=PARAM) from error
        matcher = LLMatcher(trie, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(matcher)
        # What is only found when a grammar is used, too many alternatives or none, mostly shows in the first tokens.
        trial = Guide(matcher.deep_copy())
        for _ in range(_TRIAL_TOKENS):
            allowed = trial.allowed(self._vocabulary.size)
            if not trial.is_over:
                trial.accept(int(allowed.int().argmax()))
        return matcher


def _refusal(matcher: LLMatcher) -> InvalidRequest:
    return InvalidRequest(f"the schema cannot be followed: {_reason(matcher.get_error())}", param=PARAM)


def _reason(error: str) -> str:
    """llguidance's words in one line."""
    return " ".join(error.removesuffix("<non-verbose/>").split())[:500]
