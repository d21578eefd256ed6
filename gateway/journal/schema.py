"""The journal's schema: any database of ours is brought to the newest of the `migrations`, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from protocol.errors import ConfigError

_BEFORE_ALEMBIC = "schema_version"  # a table with the number 1, in databases as migration 0001 leaves them


def upgrade(engine: Engine) -> None:
    """Raises ConfigError: the database is of a later version than this program, or not ours."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # Python's driver would open a transaction at the first row that is written, and leave what came before.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        current = MigrationContext.configure(connection).get_current_revision()
        known = [script.revision for script in scripts.walk_revisions()]
        if current is not None and current not in known:
            raise _refused(engine, current, known[0])
        config.attributes["connection"] = connection
        if current is None and inspect(connection).has_table(_BEFORE_ALEMBIC):
            _check_before_alembic(connection, engine, known[0])
            command.stamp(config, "0001")
        command.upgrade(config, "head")
        connection.commit()


def _check_before_alembic(connection: Connection, engine: Engine, newest: str) -> None:
    version = connection.execute(text(f"select version from {_BEFORE_ALEMBIC}")).scalar()
    if version != 1:
        raise _refused(engine, str(version), newest)


def _refused(engine: Engine, found: str, newest: str) -> ConfigError:
    return ConfigError(
        f"the journal at {engine.url!r} has schema version {found}, this program reads up to {newest}",
        param="database_url",
    )
