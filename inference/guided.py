"""Answers that follow a JSON schema or another grammar: which tokens may come next. The grammar is llguidance's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from inference.vocabulary import Vocabulary
from protocol.errors import InternalError, InvalidRequest

PARAM = "response_format"

# A compilation cannot be stopped, but llguidance's own limits end it: the worst schemas we know take 0.13 s of CPU.
# They bound each later step, too, and memory: a lexer's state takes one or two kilobytes.
_DEADLINE_S = 10.0
_LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)  # its words go to clients
# Without a bound a small model may write white space for ever; this much is a line break and a deep indentation.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
_TRIAL_TOKENS = 2  # an opening bracket and what comes first in it


class Guide:
    """Follows one answer, token by token. Owned by one thread."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        """Use compile_schema. param: the field that errors name."""
        self._matcher = matcher
        self._param = param

    def copy(self) -> Guide:
        """For another attempt at the same answer, and nothing else.

        Copies share what llguidance's lexer learns, and its limit.
        """
        return Guide(self._matcher.deep_copy(), self._param)

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
            raise _refusal(self._matcher.get_error(), self._param)
        mask = np.zeros(vocabulary, dtype=bool)
        bits = np.unpackbits(packed, count=min(vocabulary, 8 * len(packed)), bitorder="little")
        mask[: len(bits)] = bits
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """`token` was chosen. Raises InternalError: it is not allowed. InvalidRequest: as `allowed`."""
        if not self._matcher.try_consume_tokens([token]):
            if self._matcher.is_error():
                raise _refusal(self._matcher.get_error(), self._param)
            raise InternalError(f"token {token} does not follow the schema")


async def compile_schema(vocabulary: Vocabulary, schema: str) -> Guide:
    """A guide for an answer that `schema`, a JSON schema as JSON, allows. Off the event loop; typically a millisecond.

    Nothing is kept for the next answer with the same schema: what one answer made the lexer learn counts towards the
    limit of the next.
    Raises InvalidRequest: it is no schema, uses what is not supported, or is too large or slow to compile.
    """

    def make_grammar() -> str:
        # Ours last, so that a schema's own "x-guidance" does not undo it.
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})

    return await _compile_in_thread(vocabulary, make_grammar, PARAM)


async def compile_lark(vocabulary: Vocabulary, lark: str, param: str) -> Guide:
    """As compile_schema, of a grammar in llguidance's dialect of Lark."""
    return await _compile_in_thread(vocabulary, lambda: LLMatcher.grammar_from_lark(lark), param)


async def _compile_in_thread(vocabulary: Vocabulary, make_grammar: Callable[[], str], param: str) -> Guide:
    try:
        trie = await asyncio.to_thread(vocabulary.trie)
    except ValueError as error:
        raise InvalidRequest(f"this model's tokenizer cannot follow schemas: {error}", param=param) from error
    try:
        compiling = asyncio.to_thread(_compile, trie, vocabulary.size, make_grammar, param)
        return await asyncio.wait_for(compiling, _DEADLINE_S)
    except TimeoutError as error:
        raise InvalidRequest(f"the schema does not compile in {_DEADLINE_S:g} s", param=param) from error


def _compile(trie: LLTokenizer, vocabulary: int, make_grammar: Callable[[], str], param: str) -> Guide:
    try:
        grammar = make_grammar()
    except ValueError as error:
        raise InvalidRequest(f"the schema cannot be read: {_reason(str(error))}", param=param) from error
    matcher = LLMatcher(trie, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise _refusal(matcher.get_error(), param)
    # What is only found when a grammar is used, too many alternatives or none, mostly shows in the first tokens.
    trial = Guide(matcher.deep_copy(), param)
    for _ in range(_TRIAL_TOKENS):
        allowed = trial.allowed(vocabulary)
        if not trial.is_over:
            trial.accept(int(allowed.int().argmax()))
    return Guide(matcher, param)


def _refusal(error: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"the schema cannot be followed: {_reason(error)}", param=param)


def _reason(error: str) -> str:
    """llguidance's words in one line."""
    return " ".join(error.removesuffix("<non-verbose/>").split())[:500]
