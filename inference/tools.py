"""Calls of tools: how a model writes them, by its chat template, and grammars that make it write good ones. Pure.

    hermes   Hermes, Qwen and others: text, <tool_call>, {"name": ..., "arguments": {...}}, </tool_call>, repeated
    llama3   Llama 3: the whole answer is {"name": ..., "parameters": {...}}

gateway/tool_calls.py reads both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from protocol.messages import Tools

ToolFormat = Literal["", "hermes", "llama3"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
# As templates render calls of earlier turns (tojson's separators): what was generated is rendered again as it was.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tool_format(chat_template: str) -> ToolFormat:
    """How a model with this template writes calls; empty: its template knows no tools, or another way."""
    if "tools" not in chat_template:
        return ""
    if OPEN in chat_template:
        return "hermes"
    if '"parameters"' in chat_template and ("<|python_tag|>" in chat_template or "ipython" in chat_template):
        return "llama3"
    return ""


@dataclass(frozen=True)
class _Function:
    name: str
    schema: dict[str, Any]
    is_strict: bool


class Marks(NamedTuple):
    """The tokens that the tokenizer has for <tool_call> and </tool_call>; None: they are ordinary text to it."""

    open: int | None = None
    close: int | None = None


def tool_grammar(tools: Tools, chosen: ToolFormat, marks: Marks) -> str:
    """A grammar in llguidance's dialect of Lark for the whole answer; empty: it may be whatever the model says."""
    functions = [_function(tool) for tool in json.loads(tools.functions)]
    if tools.name:
        functions = [function for function in functions if function.name == tools.name]
    is_demanded = tools.choice == "required"
    is_free = tools.choice == "auto" and tools.parallel and not any(function.is_strict for function in functions)
    if tools.choice == "none" or is_free:
        return ""
    if chosen == "llama3":
        start = "start: call" if is_demanded else "start: call | TEXT\nTEXT: /([^{](.|\\n)*)?/"
        return "\n".join(["%llguidance {}", start, *_calls(functions, "parameters")])
    # llguidance takes tokens that look like marks for no text at all: they are named by their number.
    opened = json.dumps(OPEN) if marks.open is None else f"<[{marks.open}]>"
    closed = json.dumps(CLOSE) if marks.close is None else f"<[{marks.close}]>"
    body = f'"\\n" call "\\n" {closed}'
    if is_demanded:
        start = 'start: marked ("\\n" marked)*' if tools.parallel and not tools.name else "start: marked"
        return "\n".join(["%llguidance {}", start, f"marked: {opened} {body}", *_calls(functions, "arguments")])
    # Text up to the mark, and a call behind it. Without a token for the mark, the shortest text that ends with it.
    head = f"spoken: TEXT {opened}" if marks.open is not None else f"head[lazy]: TEXT {opened}\nspoken: head"
    start = "start: spoken* TEXT" if tools.parallel else "start: TEXT | spoken"
    lines = ["%llguidance {}", start, f"{head} {body}", "TEXT: /(.|\\n)*/"]
    return "\n".join([*lines, *_calls(functions, "arguments")])


def _calls(functions: Sequence[_Function], arguments: str) -> list[str]:
    """Rules for `call`: one of the functions, with arguments of its schema. A schema is a root, so its $refs hold."""
    lines = ["call: " + " | ".join(f"call_{number}" for number in range(len(functions)))]
    for number, function in enumerate(functions):
        head = json.dumps(f'{{"name": "{function.name}", "{arguments}": ')
        schema = json.dumps({**function.schema, "x-guidance": _SPACING})
        lines += [f'call_{number}: {head} arguments_{number} "}}"', f"arguments_{number}: %json {schema}"]
    return lines


def _function(tool: dict[str, Any]) -> _Function:
    function = tool["function"]
    return _Function(function["name"], function.get("parameters") or _ANY_OBJECT, bool(function.get("strict")))
