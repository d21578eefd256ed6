"""Statements run by the database's driver itself, on connections of SQLAlchemy's pool.

What every turn asks is compiled once. To run such a statement SQLAlchemy takes several times as long as SQLite does,
and more so on a thread that has slept: docs/results/gateway.md has figures. Values are what the driver takes: JSON is
text already (tables.ascii_json).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, cast

from sqlalchemy import ClauseElement, Engine
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.sql.compiler import SQLCompiler


class _Text(NamedTuple):
    text: str
    names: Sequence[str] | None  # of its values in their order; None: the driver takes them by name
    constants: Mapping[str, Any]  # values of SQLAlchemy's own


class Driver:
    """Owned by one thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._texts: dict[ClauseElement, _Text] = {}

    @property
    def error(self) -> type[Exception]:
        """What the driver raises."""
        return self._engine.dialect.loaded_dbapi.Error

    def transaction(self) -> Transaction:
        return Transaction(self, self._engine)

    def prepare(self, statement: ClauseElement, values: Mapping[str, Any]) -> tuple[str, Any]:
        """The driver's text and parameters. statement: one of few; each is kept."""
        known = self._texts.get(statement)
        if known is None:
            compiled = cast(SQLCompiler, statement.compile(dialect=self._engine.dialect))
            constants = {name: value for name, value in compiled.params.items() if value is not None}
            known = self._texts[statement] = _Text(compiled.string, compiled.positiontup, constants)
        values = {**known.constants, **values}
        return known.text, values if known.names is None else tuple(values[name] for name in known.names)


class Transaction:
    """Committed where its block ends without an error. Raises Driver.error."""

    def __init__(self, driver: Driver, engine: Engine) -> None:
        self._driver = driver
        self._connection = engine.raw_connection()
        self._cursor = self._connection.cursor()

    def execute(self, statement: ClauseElement, values: Mapping[str, Any]) -> DBAPICursor:
        """The cursor, which is the next statement's too."""
        self._cursor.execute(*self._driver.prepare(statement, values))
        return self._cursor

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            if error is None:
                self._connection.commit()
        finally:
            self._connection.close()  # which rolls back what was not committed
