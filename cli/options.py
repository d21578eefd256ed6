"""Command-line options, made from the fields of Settings: written down once, the same in every command."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic_core import PydanticUndefined

from cli.settings import Settings
from cli.sizes import format_size

R = TypeVar("R")

_CONFIG = Annotated[
    str | None, typer.Option("--config", metavar="FILE.toml", help="Read options from a TOML file.", show_default=False)
]


def with_settings(*names: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Give a command the options of the named fields (all, if none is named) and pass it `settings`.

    The command's own parameters follow `settings` and stay as they are.
    """
    fields = names or tuple(Settings.model_fields)

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def called(**arguments: Any) -> R:
            flags = {name: arguments.pop(name) for name in (*fields, "config")}
            given = {name: value for name, value in flags.items() if value is not None}
            return command(Settings.load(given, os.environ), **arguments)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        options = [_option(name) for name in fields]
        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_CONFIG)
        keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        parameters = [*keyword, *options, config]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def _option(name: str) -> inspect.Parameter:
    """An option that says nothing of its value: Settings alone judges it, wherever it came from."""
    field = Settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    text = (field.description or "").replace("[", "\\[")
    text = text[0].upper() + text[1:] + "."
    if field.annotation is bool:
        if field.default:
            flag += f"/--no-{flag.removeprefix('--')}"
        option = typer.Option(flag, help=text, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        if field.default not in (None, PydanticUndefined):
            default = format_size(field.default) if _is_size(name) else field.default
            text += f" \\[default: {default}]"
        annotation = Annotated[str | None, typer.Option(flag, metavar=metavar(name), help=text, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _is_size(name: str) -> bool:
    field = Settings.model_fields[name]
    rules = [
        *field.metadata,
        *(rule for part in get_args(field.annotation) for rule in getattr(part, "__metadata__", ())),
    ]
    return any(isinstance(rule, BeforeValidator) for rule in rules)


def metavar(name: str) -> str:
    """What stands for a setting's value."""
    annotation = Settings.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if _is_size(name):
        return "SIZE"
    if name in ("api_keys", "tls_certificate", "tls_key"):
        return "FILE"
    if annotation in (int, int | None, float):
        return "N"
    return "DIR" if name.endswith("dir") or name == "keys" else "TEXT"
