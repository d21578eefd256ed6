"""Indexes by which a turn's origin is found with one seek for each key, however many turns there are."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_PENDING, _DONE = sa.text("status = 'pending'"), sa.text("status = 'done'")


def upgrade() -> None:
    # SQLite took the index of all that is done for better than that of a few keys.
    op.drop_index("turns_by_status", "turns")
    op.create_index("turns_pending", "turns", ["status"], sqlite_where=_PENDING, postgresql_where=_PENDING)
    for name, column in (
        ("turns_by_key", "turn_key"),
        ("turns_by_request_key", "request_key"),
        ("turns_by_content_key", "content_key"),
    ):
        op.drop_index(name, "turns")
        columns = [column, "stored", "created_at_s"]
        op.create_index(name, "turns", columns, sqlite_where=_DONE, postgresql_where=_DONE)
