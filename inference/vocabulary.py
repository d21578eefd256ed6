"""The tokens of a model as bytes, which is what grammars and log probabilities speak of."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer

from monitoring.logs import get_logger

log = get_logger(__name__)


class Vocabulary:
    """Every token's bytes. Safe from any thread."""

    def __init__(self, tokenizer: Any, size: int, eos_ids: Collection[int]) -> None:
        """tokenizer: transformers' fast one. size: of the logits, which may be more than the tokenizer's."""
        self.size = size
        self._tokenizer = tokenizer
        self._eos_ids = sorted(eos_ids)
        self._special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._lock = threading.Lock()
        self._trie: LLTokenizer | None = None
        self._unreadable = ""

    def trie(self) -> LLTokenizer:
        """The tokens as llguidance has them. Slow the first time: a second for a hundred thousand tokens.

        Raises ValueError: a tokenizer of a kind that llguidance does not read.
        """
        with self._lock:
            if self._unreadable:
                raise ValueError(self._unreadable)
            if self._trie is None:
                try:
                    self._trie = from_tokenizer(
                        self._tokenizer,
                        n_vocab=max(self.size, len(self._tokenizer)),
                        eos_token=self._eos_ids or None,
                        slices=LLTokenizer.json_slices(),
                    )
                except Exception as error:  # it names no class; nothing but this tokenizer is at fault
                    self._unreadable = f"{type(error).__name__}: {error}"
                    log.warning("tokens have no bytes", reason=self._unreadable)
                    raise ValueError(self._unreadable) from error
            return self._trie

    def token_of(self, mark: str) -> int | None:
        """The token that the tokenizer has for `mark` alone, if it has one that is text to it."""
        token = self._tokenizer.get_added_vocab().get(mark)
        return None if token is None or token in self._special else int(token)

    def name_of(self, token: int) -> str:
        """How the tokenizer writes `token`; empty where there is none."""
        return self._tokenizer.convert_ids_to_tokens(token) or ""

    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` adds to a text; where they cannot be known, those of its text alone."""
        if token in self._special or not self.name_of(token):  # or logits are padded
            return b""
        try:
            found = self.trie().decode_bytes([token])
        except ValueError:
            found = b""
        # llguidance leaves out the byte 0xFF, which is in no text.
        return found or str(self._tokenizer.decode([token])).encode()
