"""Which conversation a request continues: the turn keys of its messages. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from protocol import ids
from protocol.messages import ChatMessage


def _as_counted(message: ChatMessage) -> ids.Message:
    return ids.Message(message.role, message.content, message.name, message.tool_call_id, message.tool_calls)


@dataclass(frozen=True)
class Transcript:
    """The messages of one request under the root of its tenant, model and chat template.

    A stateless client sends the whole history every time; the turn key after an answer that we gave tells, without
    any id from the client, which turn it continues.
    """

    root: bytes  # ids.conversation_root
    messages: tuple[ChatMessage, ...]  # never empty

    @cached_property
    def keys(self) -> list[bytes]:
        """The turn key after each message."""
        return ids.turn_keys(self.root, [_as_counted(message) for message in self.messages])

    @property
    def request_key(self) -> bytes:
        return self.keys[-1]

    @property
    def answer_keys(self) -> list[bytes]:
        """Keys after assistant messages, longest prefix first: the only places where a finished turn can end."""
        pairs = zip(self.messages, self.keys, strict=True)
        return [key for message, key in pairs if message.role == "assistant"][::-1]

    def asked_keys(self, after: bytes | None) -> list[bytes]:
        """Keys behind `after` where another turn may have been asked, longest prefix first.

        An answer that was regenerated, edited, or comes back without its reasoning makes a branch there.
        """
        behind = list(zip(self.messages, self.keys, strict=True))[self._place(after) :]
        return [key for message, key in behind if message.role != "assistant"][::-1]

    def after(self, key: bytes | None) -> tuple[ChatMessage, ...]:
        """The messages that are new since `key`; all of them for None."""
        return self.messages[self._place(key) :]

    def _place(self, key: bytes | None) -> int:
        return 0 if key is None else self.keys.index(key) + 1


def answer_key(request_key: bytes, text: str) -> bytes:
    """The turn key of a finished turn: the request and its answer."""
    return ids.turn_key(request_key, ids.Message("assistant", text))


def content_root(tenant: bytes) -> bytes:
    """The root of keys that do not depend on model, template and salt: they tell why a turn is not continued."""
    return ids.digest("content", tenant)
