"""Conversations and the tree of their turns.

Databases from before alembic have these tables and a table `schema_version` with the number 1.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.LargeBinary(16)


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("tenant", _ID, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("created_at_s", sa.Float, nullable=False),
        sa.Column("updated_at_s", sa.Float, nullable=False),
    )
    op.create_index("ix_conversations_tenant", "conversations", ["tenant"])
    op.create_table(
        "turns",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("conversation_id", _ID, sa.ForeignKey("conversations.id"), nullable=False),
        sa.Column("parent_id", _ID, sa.ForeignKey("turns.id")),
        sa.Column("tenant", _ID, nullable=False),
        sa.Column("request_key", _ID, nullable=False),
        sa.Column("turn_key", _ID),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("messages", sa.Text, nullable=False),
        sa.Column("answer", sa.Text),
        sa.Column("answer_tokens", sa.LargeBinary),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("prompt_tokens", sa.BigInteger),
        sa.Column("completion_tokens", sa.BigInteger),
        sa.Column("usage", sa.Text),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error", sa.Text),
        sa.Column("created_at_s", sa.Float, nullable=False),
        sa.Column("finished_at_s", sa.Float),
        sa.CheckConstraint("status in ('pending', 'done', 'failed', 'cancelled')", name="status"),
        sa.CheckConstraint("(status = 'done') = (turn_key is not null)", name="done_has_key"),
    )
    op.create_index("turns_by_key", "turns", ["turn_key"])
    op.create_index("turns_by_status", "turns", ["status"])
    op.create_index("ix_turns_conversation_id", "turns", ["conversation_id"])
    op.create_index("ix_turns_parent_id", "turns", ["parent_id"])
