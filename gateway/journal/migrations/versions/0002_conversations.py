"""Conversations with titles, metadata, pins and lifetimes; turns that can be found again by what was said alone."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.LargeBinary(16)
_TITLE_LENGTH = 80


def upgrade() -> None:
    op.add_column("conversations", sa.Column("title", sa.Text))
    op.add_column("conversations", sa.Column("metadata", sa.Text))
    op.add_column("conversations", sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("conversations", sa.Column("ttl_s", sa.Float))
    op.add_column("conversations", sa.Column("stored", sa.Boolean, nullable=False, server_default=sa.true()))
    op.create_index("conversations_by_use", "conversations", ["tenant", "updated_at_s"])
    op.drop_index("ix_conversations_tenant", "conversations")
    op.add_column("turns", sa.Column("content_key", _ID))
    op.add_column("turns", sa.Column("namespace", _ID))
    op.add_column("turns", sa.Column("response", sa.Text))
    op.add_column("turns", sa.Column("stored", sa.Boolean, nullable=False, server_default=sa.true()))
    op.add_column("turns", sa.Column("ttft_s", sa.Float))
    op.add_column("turns", sa.Column("prefill_s", sa.Float))
    op.create_index("turns_by_request_key", "turns", ["request_key"])
    op.create_index("turns_by_content_key", "turns", ["content_key"])
    _title_conversations()
    if sa.inspect(op.get_bind()).has_table("schema_version"):
        op.drop_table("schema_version")


def _title_conversations() -> None:
    """By the first thing that a user said, as new ones are."""
    conversations = sa.table("conversations", sa.column("id", _ID), sa.column("title", sa.Text))
    turns = sa.table(
        "turns",
        sa.column("conversation_id", _ID),
        sa.column("parent_id", _ID),
        sa.column("messages", sa.Text),
        sa.column("created_at_s", sa.Float),
    )
    connection = op.get_bind()
    first = sa.select(turns.c.conversation_id, turns.c.messages).where(turns.c.parent_id.is_(None))
    for conversation_id, messages in connection.execute(first.order_by(turns.c.created_at_s.desc())).all():
        said = next((m["content"] for m in json.loads(messages) if m["role"] == "user" and m["content"].strip()), "")
        title = " ".join(said.split())[:_TITLE_LENGTH]
        connection.execute(
            sa.update(conversations)
            .where(conversations.c.id == conversation_id)
            .values(title=json.dumps(title) if title else None)
        )
