"""Tables: the many of one kind that a message has, as columns on the wire and in memory, as rows to whoever looks.

A row is a named tuple whose fields have the types of fields.py. Names and checks are paid for once in a column, not in
every row: of 64 leased chunks that is five sixths of what coding the answer costs.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import repeat
from typing import Annotated, Any, TypeVar, get_args, get_type_hints, overload

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from protocol.fields import Count

Row = TypeVar("Row", bound=tuple[Any, ...])  # a named tuple


class Table(Sequence[Row]):
    """Immutable. columns: one sequence for each field of the row, in its order; a row is made when it is looked at."""

    __slots__ = ("columns", "row")

    def __init__(self, row: type[Row], **columns: Sequence[Any]) -> None:
        """A column that is not given holds the row's default. Raises ValueError: the columns are not of one length."""
        names, defaults = row._fields, row._field_defaults  # type: ignore[attr-defined]
        length = len(columns[names[0]])
        self.row = row
        self.columns = {name: columns[name] if name in columns else (defaults[name],) * length for name in names}
        if any(len(column) != length for column in self.columns.values()):
            raise ValueError("the columns are not of one length")

    def packed(self) -> dict[str, Any]:
        """The columns as they travel. Raises TypeError, OverflowError: a count is none."""
        counts = _counts(self.row)
        return {name: _pack_counts(column) if name in counts else column for name, column in self.columns.items()}

    @classmethod
    def of(cls, row: type[Row], rows: Sequence[Row]) -> Table[Row]:
        """Raises TypeError, ValueError: these are not such rows."""
        if isinstance(rows, Table) and rows.row is row:
            return rows
        names = row._fields  # type: ignore[attr-defined]
        return cls(row, **dict(zip(names, zip(*rows, strict=True) if rows else repeat((), len(names)), strict=True)))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __iter__(self) -> Iterator[Row]:
        return map(self.row._make, zip(*self.columns.values(), strict=True))  # type: ignore[attr-defined]

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Table[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Table[Row]:
        found = {name: column[at] for name, column in self.columns.items()}
        return Table(self.row, **found) if isinstance(at, slice) else self.row(**found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@cache
def _counts(row: type) -> frozenset[str]:
    """The columns of counts. Each travels as one blob, of 64-bit little-endian integers: there is nothing to check."""
    return frozenset(name for name, hint in get_type_hints(row, include_extras=True).items() if hint == Count)


def _pack_counts(counts: Sequence[int]) -> bytes:
    packed = array("Q", counts)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack_counts(packed: bytes) -> Sequence[int]:
    counts = array("Q")
    counts.frombytes(packed)
    if sys.byteorder == "big":
        counts.byteswap()
    return counts


class _Columns:
    """Pydantic's part of Rows. As in messages, columns that a receiver does not know are ignored."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        row = get_args(source)[0]
        counts = core_schema.no_info_after_validator_function(_unpack_counts, core_schema.bytes_schema(strict=True))
        columns = {
            name: core_schema.typed_dict_field(
                counts if name in _counts(row) else core_schema.tuple_variable_schema(handler.generate_schema(hint)),
                required=name not in row._field_defaults,
            )
            for name, hint in get_type_hints(row, include_extras=True).items()
        }
        return core_schema.no_info_after_validator_function(
            lambda found: Table(row, **found), core_schema.typed_dict_schema(columns)
        )


# Many of one kind, in a message. They travel as a map of columns, and arrive as a Table.
Rows = Annotated[Sequence[Row], _Columns()]


def row_type(hint: Any) -> type[Any] | None:
    """The type of the rows that a field of this type holds, if it does."""
    return get_args(get_args(hint)[0])[0] if _Columns in map(type, getattr(hint, "__metadata__", ())) else None
