"""Between text and tokens: the rendered prompt, and an answer's text as its tokens arrive."""

from __future__ import annotations

import json
import os.path
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from inference.stops import StopStrings
from protocol.errors import InvalidRequest
from protocol.ids import TokenArray
from protocol.messages import ChatMessage, Manifest, Prompt

# A byte sequence that is no UTF-8 can grow by three bytes before it is known to be broken.
_LONGEST_PENDING_TOKENS = 4


def render(tokenizer: Any, messages: Sequence[ChatMessage], tools: str = "", for_answer: bool = True) -> str:
    """The prompt of a conversation by the model's own chat template.

    tools: JSON of what may be called. for_answer: it ends where an answer begins.
    Raises InvalidRequest: the template refuses these messages (an order of roles, say), in its own words.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [_template_message(m) for m in messages],
            tools=_template_tools(tools),
            tokenize=False,
            add_generation_prompt=for_answer,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
    return text


def _template_tools(tools: str) -> list[dict[str, Any]] | None:
    """As models were trained on them: how strictly a function is to be called is not for their eyes."""
    found: list[dict[str, Any]] = json.loads(tools) if tools else []
    for tool in found:
        tool["function"].pop("strict", None)
    return found or None


def _template_message(message: ChatMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        plain["name"] = message.name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = json.loads(message.tool_calls)
        for call in plain["tool_calls"]:
            call["function"]["arguments"] = _as_object(call["function"]["arguments"])
    return plain


def _as_object(arguments: str) -> Any:
    """Arguments of a call as templates want them: they render the object themselves. Text that is no JSON stays."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def text_before(tokenizer: Any, text: str, messages: Sequence[ChatMessage], index: int, tools: str = "") -> int:
    """How many characters of `text`, the rendered `messages`, come before the content of one of them.

    Seen from the outside, whatever the template does: that message is replaced, and what stays the same comes before.
    """
    probe = "1" if messages[index].content[:1] == "0" else "0"
    changed = [*messages[:index], replace(messages[index], content=probe), *messages[index + 1 :]]
    other = render(tokenizer, changed, tools)
    return len(os.path.commonprefix([text, other]))  # noqa: RUF071


def tokenize(tokenizer: Any, text: str, add_special_tokens: bool = False) -> TokenArray:
    """Token ids of rendered text. Lone surrogates, which no tokenizer can read, become U+FFFD."""
    clean = text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return np.asarray(tokenizer(clean, add_special_tokens=add_special_tokens).input_ids, dtype=np.uint32)


def raw_prompt_tokens(tokenizer: Any, prompt: Prompt, vocabulary: int) -> TokenArray:
    """Token ids of a prompt that no template renders. Raises InvalidRequest: empty, or an id that is no token."""
    if prompt.tokens:
        token_ids = np.frombuffer(prompt.tokens, dtype="<u4")
        if int(token_ids.max()) >= vocabulary:
            raise InvalidRequest(f"there is no token {token_ids.max()}; the model has {vocabulary}", param="prompt")
    else:
        token_ids = tokenize(tokenizer, prompt.text, add_special_tokens=True)
    if not len(token_ids):
        raise InvalidRequest("the prompt is empty", param="prompt")
    return token_ids


def prompt_tokens(tokenizer: Any, text: str, parent: Manifest | None) -> tuple[TokenArray, bool]:
    """Token ids of a rendered prompt, and whether they continue `parent`'s exactly.

    Where the text starts with the parent's, the parent's ids are taken as they are and only the rest is
    tokenized: what was generated never changes by tokenizing it again, also where its bytes are no valid UTF-8.
    Where only the parent's prompt is the same (its answer was regenerated or edited), so are that prompt's ids, which
    earlier answers are a part of.
    """
    if parent is None:
        return tokenize(tokenizer, text), False
    saved, asked = np.frombuffer(parent.token_ids, dtype="<u4"), parent.prompt_chars
    if text.startswith(parent.text):
        return np.concatenate([saved, tokenize(tokenizer, text[len(parent.text) :])]), True
    if text.startswith(parent.text[:asked]):
        return np.concatenate([saved[: parent.prompt_tokens], tokenize(tokenizer, text[asked:])]), False
    return tokenize(tokenizer, text), False


class Detokenizer:
    """Text of tokens as they come, whole characters only: `tokenizers`' DecodeStream, which never stalls here.

    A DecodeStream waits for ever on bytes that are no UTF-8, and keeps what it has at the end.
    """

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: the backend (tokenizers.Tokenizer) of a fast tokenizer."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._anchor: list[int] = []  # the last tokens with text: what the next ones are joined to
        self._pending: list[int] = []

    @property
    def pending(self) -> int:
        """Tokens whose text did not come out yet."""
        return len(self._pending)

    def feed(self, token: int) -> str | None:
        """Take one more token. Returns the text of all pending tokens, or None: it is not known yet."""
        self._pending.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception as error:
            # Decoders that change text which they had given out before, as some do at punctuation.
            if not str(error).startswith("Invalid prefix"):
                raise
            return self.flush()
        if text is None:
            return self.flush() if len(self._pending) > _LONGEST_PENDING_TOKENS else None
        self._anchor, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The text of all pending tokens as it is now, with U+FFFD for what is no character."""
        before = self._decode(self._anchor)
        text = self._decode(self._anchor + self._pending)[len(before) :]
        self._pending = []
        self._stream = DecodeStream(self._anchor, skip_special_tokens=True)
        return text

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class AnswerText:
    """The text of an answer, token by token.

    Text is given out when no later token can change it: not while it ends in an incomplete character, nor
    while it could be the beginning of a stop string. All pieces put together are `text`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""  # given out so far
        self._detokenizer = Detokenizer(tokenizer.backend_tokenizer)
        self._stops = StopStrings(stop)
        self._tokens = 0
        self._ends: list[tuple[int, int]] = [(0, 0)]  # (tokens, length of their text) wherever characters are whole
        self._settled = 0  # index in _ends

    @property
    def stopped(self) -> bool:
        """A stop string was met; `text` ends before it."""
        return self._stops.is_met

    def feed(self, token: int) -> str:
        """Take one more token. Returns the text that became final, which may be empty."""
        self._tokens += 1
        piece = self._detokenizer.feed(token)
        return "" if piece is None else self._accept(piece)

    def finish(self) -> str:
        """The answer is over. Returns what was held back."""
        piece = ""
        if self._detokenizer.pending and not self.stopped:
            piece = self._accept(self._detokenizer.flush())
        held = self._stops.finish()
        self.text += held
        return piece + held

    def token_boundary(self) -> tuple[int, int]:
        """The most tokens whose text lies wholly within `text`: (tokens, length of their text)."""
        return max(end for end in self._ends if end[1] <= len(self.text))

    @property
    def settled(self) -> int:
        """How many leading tokens are settled: a part of their text is in `text`, or they have none."""
        ends, given = self._ends, len(self.text)
        while self._settled + 1 < len(ends):
            start, end = ends[self._settled][1], ends[self._settled + 1][1]
            if start >= given and end > given:
                break
            self._settled += 1
        return ends[self._settled][0]

    def _accept(self, piece: str) -> str:
        self._ends.append((self._tokens, self._ends[-1][1] + len(piece)))
        out = self._stops.feed(piece)
        self.text += out
        return out


# What models of different families write where they call a tool.
_TOOL_CALLS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<function=", "<|tool_calls_section_begin|>")


def calls_tool(answer: str, has_tools: bool = False) -> bool:
    """Whether a tool speaks next, and not a person, as far as the answer shows."""
    return any(mark in answer for mark in _TOOL_CALLS) or (has_tools and answer.lstrip().startswith("{"))
