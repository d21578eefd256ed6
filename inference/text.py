"""Between text and tokens: the rendered prompt, and an answer's text as its tokens arrive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from protocol.errors import InvalidRequest
from protocol.ids import TokenArray
from protocol.messages import ChatMessage, Manifest

REPLACEMENT = "�"
# A byte sequence that is no UTF-8 can grow by three bytes before it is known to be broken.
_LONGEST_PENDING_TOKENS = 4


def render(tokenizer: Any, messages: Sequence[ChatMessage]) -> str:
    """The prompt of a conversation by the model's own chat template.

    Raises InvalidRequest: the template refuses these messages (an order of roles, say), in its own words.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [_template_message(m) for m in messages], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
    return text


def _template_message(message: ChatMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        plain["name"] = message.name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = json.loads(message.tool_calls)
    return plain


def tokenize(tokenizer: Any, text: str) -> TokenArray:
    """Token ids of rendered text. Lone surrogates, which no tokenizer can read, become U+FFFD."""
    clean = text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return np.asarray(tokenizer(clean, add_special_tokens=False).input_ids, dtype=np.uint32)


def prompt_tokens(tokenizer: Any, text: str, parent: Manifest | None) -> tuple[TokenArray, bool]:
    """Token ids of a rendered prompt, and whether they continue `parent`'s exactly.

    Where the text starts with the parent's, the parent's ids are taken as they are and only the rest is
    tokenized: what was generated never changes by tokenizing it again, also where its bytes are no valid UTF-8.
    """
    if parent is not None and text.startswith(parent.text):
        saved = np.frombuffer(parent.token_ids, dtype="<u4")
        return np.concatenate([saved, tokenize(tokenizer, text[len(parent.text) :])]), True
    return tokenize(tokenizer, text), False


class AnswerText:
    """The text of an answer, token by token.

    Text is given out when no later token can change it: not while it ends in an incomplete character, nor
    while it could be the beginning of a stop string. All pieces put together are `text`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""  # given out so far
        self.stopped = False  # a stop string was met; `text` ends before it
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._stable = ""  # text of tokens whose characters are complete
        self._window = 0  # decoding starts here: far enough back that joining rules see their neighbours
        self._decoded = 0  # tokens whose text is in _stable
        self._ends: list[tuple[int, int]] = [(0, 0)]  # (tokens, length of _stable) wherever _stable grew

    def feed(self, token: int) -> str:
        """Take one more token. Returns the text that became final, which may be empty."""
        self._ids.append(token)
        before = self._decode(self._window, self._decoded)
        after = self._decode(self._window, len(self._ids))
        pending = len(self._ids) - self._decoded
        if len(after) > len(before) and (not after.endswith(REPLACEMENT) or pending > _LONGEST_PENDING_TOKENS):
            self._accept(after[len(before) :])
        return self._give_out(final=False)

    def finish(self) -> str:
        """The answer is over. Returns what was held back."""
        if self._decoded < len(self._ids) and not self.stopped:
            before = self._decode(self._window, self._decoded)
            self._accept(self._decode(self._window, len(self._ids))[len(before) :])
        return self._give_out(final=True)

    def token_boundary(self) -> tuple[int, int]:
        """The most tokens whose text lies wholly within `text`: (tokens, length of their text)."""
        return max(end for end in self._ends if end[1] <= len(self.text))

    def _accept(self, piece: str) -> None:
        self._stable += piece
        self._window, self._decoded = self._decoded, len(self._ids)
        self._ends.append((self._decoded, len(self._stable)))

    def _give_out(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        start = len(self.text)
        end = len(self._stable)
        # A stop string that was not there before ends in the new part, so it begins at most its length earlier.
        found = [at for s in self._stop if (at := self._stable.find(s, max(0, start - len(s)))) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        elif not final:
            end -= max((_overlap(self._stable, s) for s in self._stop), default=0)
        piece = self._stable[start:end]
        self.text += piece
        return piece

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is the beginning of `stop`, short of the whole."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


# What models of different families write where they call a tool.
_TOOL_CALLS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<function=", "<|tool_calls_section_begin|>")


def calls_tool(answer: str) -> bool:
    """Whether a tool speaks next, and not a person, as far as the answer shows."""
    return any(mark in answer for mark in _TOOL_CALLS)
