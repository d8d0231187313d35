"""The registry: every published version and where the aliases point.

Enters: finished exports, alias changes, deletions. Leaves: versions by reference. Each change goes to the
files first (`model_files.py`, the truth) and then to the index (two tables, for look-ups); at start the index
is rebuilt from the files. Called by `models.py`, from the event loop; what blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from sqlalchemy.orm import Mapped, Session, mapped_column

from cliptune.durable import is_disk_full
from cliptune.errors import DiskFullError, InvalidInputError, ModelNotFoundError, ModelStateError
from cliptune_server.catalog.model_files import DamagedAliasesError, ModelFiles, PublishedModel, check_name
from cliptune_server.catalog.traffic import Rules, Traffic, read_rules, write_rules
from cliptune_server.database import Base, Database

log = logging.getLogger(__name__)

_NAMED_IN_AN_ERROR: Final = 20


class ModelRow(Base):
    """A published version."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    created: Mapped[str]
    """ISO 8601 with time zone."""
    bytes: Mapped[int] = mapped_column(sqlalchemy.BigInteger)
    architecture: Mapped[str]
    embedding_dim: Mapped[int]
    image_size: Mapped[int]
    job_id: Mapped[str] = mapped_column(index=True)
    metrics: Mapped[dict[str, Any]] = mapped_column(sqlalchemy.JSON)
    similarity: Mapped[str]
    similarity_values: Mapped[dict[str, Any]] = mapped_column(sqlalchemy.JSON)
    serving_size: Mapped[int]
    sizes: Mapped[list[dict[str, Any]]] = mapped_column(sqlalchemy.JSON)


class AliasRow(Base):
    """Where NAME@ALIAS points."""

    __tablename__ = "aliases"

    name: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """How a user names a model: "NAME", "NAME:VERSION" or "NAME@ALIAS"."""

    name: str
    version: int | None = None
    alias: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """`InvalidInputError` when the text is none of the three forms."""
        name, at, alias = text.partition("@")
        if at:
            return cls(name=check_name(name), alias=check_name(alias, "alias"))
        name, colon, version = text.partition(":")
        if not colon:
            return cls(name=check_name(name))
        if not (version.isascii() and version.isdecimal() and 1 <= len(version) <= 9):
            raise InvalidInputError(
                f"{version!r} in {text!r} is no version: a whole number from 1", model=text
            )
        return cls(name=check_name(name), version=int(version))

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}" if self.alias else self.key if self.version else self.name

    @property
    def key(self) -> str:
        """ "NAME:VERSION"; only for a reference with a version."""
        return f"{self.name}:{self.version}"


class Registry:
    """Files and their index."""

    def __init__(self, files: ModelFiles, database: Database) -> None:
        self._files = files
        self._database = database
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Remove what a kill left behind and rebuild the index from the files."""
        async with self._change():
            removed = await asyncio.to_thread(self._files.clean)
            if removed:
                log.info("removed %d unfinished publications", removed)
            models, aliases = await asyncio.to_thread(self._read_files, await self.aliases())
            await self._database.run(lambda session: _replace_all(session, models, aliases))

    async def models(self, name: str = "") -> list[PublishedModel]:
        """All versions, or those of one name; by name, then newest first."""
        query = sqlalchemy.select(ModelRow).order_by(ModelRow.name, ModelRow.version.desc())
        if name:
            query = query.where(ModelRow.name == name)
        return await self._database.run(lambda session: [_model(row) for row in session.scalars(query)])

    async def aliases(self) -> dict[str, dict[str, int]]:
        """Name → alias → version."""

        def read(session: Session) -> dict[str, dict[str, int]]:
            found: dict[str, dict[str, int]] = {}
            for row in session.scalars(sqlalchemy.select(AliasRow).order_by(AliasRow.alias)):
                found.setdefault(row.name, {})[row.alias] = row.version
            return found

        return await self._database.run(read)

    async def find(self, reference: Reference) -> PublishedModel:
        """The version that a reference means now; a bare name means its newest. `ModelNotFoundError`."""
        return await self._database.run(lambda session: _find(session, reference))

    async def of_job(self, name: str, job_id: str) -> PublishedModel | None:
        """The version of `name` that a job published already."""
        query = sqlalchemy.select(ModelRow).where(ModelRow.name == name, ModelRow.job_id == job_id)

        def read(session: Session) -> PublishedModel | None:
            row = session.scalars(query).first()
            return _model(row) if row else None

        return await self._database.run(read)

    async def publish(
        self, export_dir: Path, *, name: str, job_id: str, metrics: Mapping[str, float]
    ) -> PublishedModel:
        """The next version of `name`, from an export; a job that published before gets its version again.

        `DiskFullError` when there is no room; nothing is published then and the export stays.
        """
        check_name(name)
        async with self._change():
            model = await self.of_job(name, job_id) if job_id else None
            if model is None:
                model = await asyncio.to_thread(
                    self._files.publish, export_dir, name=name, job_id=job_id, metrics=metrics
                )
                row = _row(model)
                await self._database.run(lambda session: session.merge(row))
                log.info("published %s", model.key)
            return model

    def draft(self) -> Path:
        """A folder to come, for what is to be published: on the registry's disk, swept at the next start."""
        return self._files.draft()

    async def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point NAME@ALIAS at a version that exists."""
        check_name(alias, "alias")
        await self._write_aliases(name, lambda aliases: {**aliases, alias: version})

    async def delete_alias(self, name: str, alias: str) -> None:
        """Forget NAME@ALIAS. `ModelNotFoundError` when there is none."""
        await self.find(Reference(name=name, alias=alias))
        await self._write_aliases(name, lambda aliases: {k: v for k, v in aliases.items() if k != alias})

    async def delete(self, model: PublishedModel) -> None:
        """Remove a version. `ModelStateError` while an alias points at it."""
        async with self._change():
            aliases = (await self.aliases()).get(model.name, {})
            pointing = [alias for alias, version in aliases.items() if version == model.version]
            if pointing:
                named = ", ".join(f"{model.name}@{alias}" for alias in pointing)
                raise ModelStateError(
                    f"{model.key} cannot be deleted: {named} points at it", model=model.key, aliases=named
                )
            await asyncio.to_thread(self._files.delete, model.name, model.version)
            query = sqlalchemy.delete(ModelRow).where(
                ModelRow.name == model.name, ModelRow.version == model.version
            )
            await self._database.run(lambda session: session.execute(query))
            log.info("deleted %s", model.key)

    async def traffic(self) -> Rules:
        """How the requests for aliases are shared, by the files."""
        return await asyncio.to_thread(lambda: read_rules(self._files.root, self._files.names()))

    async def set_traffic(self, named: Reference, traffic: Traffic) -> Rules:
        """Of one alias; one without shares and shadow is forgotten. Returns all that is so now."""
        async with self._change():
            rules = await self.traffic()
            before = rules.pop((named.name, named.alias), None)
            if traffic.versions:
                rules[named.name, named.alias] = traffic
            if traffic.versions or before is not None:
                await asyncio.to_thread(write_rules, self._files.root, named.name, rules)
                log.info("requests for %s: %s", named, traffic.form())
            return rules

    async def _write_aliases(self, name: str, change: Callable[[dict[str, int]], dict[str, int]]) -> None:
        async with self._change():
            indexed = (await self.aliases()).get(name, {})
            aliases = change(await asyncio.to_thread(self._read_aliases, name, indexed))
            await asyncio.to_thread(self._files.write_aliases, name, aliases)
            await self._database.run(lambda session: _replace_aliases(session, name, aliases))

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """One change at a time; a full disk is told as such."""
        async with self._changing:
            try:
                yield
            except OSError as error:
                if is_disk_full(error):
                    raise DiskFullError(f"no space left for models: {error}") from error
                raise

    def _read_files(
        self, indexed: Mapping[str, Mapping[str, int]]
    ) -> tuple[list[PublishedModel], dict[str, dict[str, int]]]:
        models: list[PublishedModel] = []
        for found in self._files.scan():
            if isinstance(found, PublishedModel):
                models.append(found)
            else:
                log.warning("the model in %s cannot be read and is left out: %s", *found)
        return models, {name: self._read_aliases(name, indexed.get(name, {})) for name in self._files.names()}

    def _read_aliases(self, name: str, indexed: Mapping[str, int]) -> dict[str, int]:
        """Those of the files; where these are damaged, those that the index remembers."""
        try:
            return self._files.aliases(name)
        except DamagedAliasesError as error:
            mended = self._files.mend_aliases(name, indexed)
            told = ", ".join(mended) or "none"
            log.warning("%s; it was set aside, and these aliases taken from the index: %s", error, told)
            return mended


def _replace_all(
    session: Session, models: Sequence[PublishedModel], aliases: Mapping[str, Mapping[str, int]]
) -> None:
    session.execute(sqlalchemy.delete(ModelRow))
    session.execute(sqlalchemy.delete(AliasRow))
    session.add_all([_row(model) for model in models])
    readable = {(model.name, model.version) for model in models}
    for name, versions in aliases.items():
        kept = {alias: version for alias, version in versions.items() if (name, version) in readable}
        _replace_aliases(session, name, kept)


def _replace_aliases(session: Session, name: str, aliases: Mapping[str, int]) -> None:
    session.execute(sqlalchemy.delete(AliasRow).where(AliasRow.name == name))
    session.add_all([AliasRow(name=name, alias=alias, version=at) for alias, at in aliases.items()])


def _find(session: Session, reference: Reference) -> PublishedModel:
    query = sqlalchemy.select(ModelRow).where(ModelRow.name == reference.name)
    version = reference.version
    if reference.alias:
        row = session.get(AliasRow, (reference.name, reference.alias))
        version = row.version if row else 0
    if version is not None:
        query = query.where(ModelRow.version == version)
    found = session.scalars(query.order_by(ModelRow.version.desc())).first()
    if found is None:
        there = _what_there_is(session, reference.name)
        raise ModelNotFoundError(f"there is no model {reference}; {there}", model=reference)
    return _model(found)


def _what_there_is(session: Session, name: str) -> str:
    """For somebody who looked for something else: the versions and aliases of the name, or the names."""
    by_version = sqlalchemy.select(ModelRow.version).where(ModelRow.name == name).order_by(ModelRow.version)
    if versions := session.scalars(by_version).all():
        by_alias = sqlalchemy.select(AliasRow.alias).where(AliasRow.name == name).order_by(AliasRow.alias)
        found = [f"{name}:{version}" for version in versions[-_NAMED_IN_AN_ERROR:]]
        found += [f"{name}@{alias}" for alias in session.scalars(by_alias)][:_NAMED_IN_AN_ERROR]
        return f"there is {', '.join(found)}"
    names = session.scalars(sqlalchemy.select(ModelRow.name).distinct().order_by(ModelRow.name)).all()
    return f"there is {', '.join(names[:_NAMED_IN_AN_ERROR])}" if names else "nothing is published yet"


def _row(model: PublishedModel) -> ModelRow:
    return ModelRow(
        name=model.name,
        version=model.version,
        path=str(model.path),
        created=model.created.isoformat(),
        bytes=model.bytes,
        architecture=model.architecture,
        embedding_dim=model.embedding_dim,
        image_size=model.image_size,
        job_id=model.job_id,
        metrics=dict(model.metrics),
        similarity=model.similarity,
        similarity_values=dict(model.similarity_values),
        serving_size=model.serving_size,
        sizes=[dict(entry) for entry in model.sizes],
    )


def _model(row: ModelRow) -> PublishedModel:
    return PublishedModel(
        name=row.name,
        version=row.version,
        path=Path(row.path),
        created=datetime.fromisoformat(row.created),
        bytes=row.bytes,
        architecture=row.architecture,
        embedding_dim=row.embedding_dim,
        image_size=row.image_size,
        job_id=row.job_id,
        metrics=row.metrics,
        similarity=row.similarity,
        similarity_values=row.similarity_values,
        serving_size=row.serving_size,
        sizes=tuple(row.sizes),
    )
