"""Published models as files and index: whole or not there, found again, never overwritten."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cliptune.errors import InvalidInputError, ModelNotFoundError, ModelStateError
from cliptune_server.catalog.model_files import MANIFEST, ModelFiles, PublishedModel, check_name
from cliptune_server.catalog.registry import Reference, Registry
from cliptune_server.database import Database

MANIFEST_FIELDS = {
    "format_version": 1,
    "architecture": "custom",
    "embedding_dim": 8,
    "image_size": [32, 48],
    "context_length": 16,
    "similarity": "cosine",
    "precision": "fp32",
    "job_id": "",
    "metrics": {"trained": 0.5},
    "created": "2026-01-02T03:04:05+00:00",
}
WEIGHTS = b"weights" * 1000


def export(folder: Path, weights: bytes = WEIGHTS) -> Path:
    """A finished export, as far as the registry looks at it."""
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps(MANIFEST_FIELDS))
    (folder / "open_clip_model.safetensors").write_bytes(weights)
    return folder


async def open_registry(tmp_path: Path) -> tuple[Registry, Database]:
    database = Database.open(tmp_path / "cliptune.db")
    registry = Registry(ModelFiles(tmp_path / "models"), database)
    await registry.start()
    return registry, database


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    registry, database = await open_registry(tmp_path)
    yield registry
    database.close()


async def test_a_published_version_has_the_exports_files_and_a_manifest_that_names_it(
    registry: Registry, tmp_path: Path
) -> None:
    source = export(tmp_path / "job" / "export")
    model = await registry.publish(source, name="cells", job_id="job-1", metrics={"auroc": 0.9})
    assert (model.key, model.image_size, model.embedding_dim) == ("cells:1", 32, 8)
    assert model.path == tmp_path / "models" / "cells" / "1"
    assert (model.path / "open_clip_model.safetensors").read_bytes() == WEIGHTS
    manifest = json.loads((model.path / MANIFEST).read_text())
    assert manifest == MANIFEST_FIELDS | {
        "name": "cells",
        "version": 1,
        "job_id": "job-1",
        "metrics": {"auroc": 0.9},
    }
    assert not source.exists()


async def test_a_job_publishes_once_however_often_it_is_asked(registry: Registry, tmp_path: Path) -> None:
    first = await registry.publish(export(tmp_path / "a"), name="cells", job_id="job-1", metrics={})
    again = await registry.publish(tmp_path / "a", name="cells", job_id="job-1", metrics={})
    other = await registry.publish(export(tmp_path / "b"), name="cells", job_id="job-2", metrics={})
    assert (first.key, again, other.key) == ("cells:1", first, "cells:2")


async def test_the_index_is_rebuilt_from_the_files_when_the_database_is_gone(tmp_path: Path) -> None:
    registry, database = await open_registry(tmp_path)
    for number in (1, 2):
        folder = export(tmp_path / f"e{number}")
        await registry.publish(folder, name="cells", job_id=f"job-{number}", metrics={"m": number})
    await registry.set_alias("cells", "prod", 1)
    before = await registry.models(), await registry.aliases()
    database.close()
    (tmp_path / "cliptune.db").unlink()

    registry, database = await open_registry(tmp_path)
    assert (await registry.models(), await registry.aliases()) == before
    assert (await registry.find(Reference.parse("cells@prod"))).version == 1
    assert (await registry.find(Reference.parse("cells"))).version == 2
    database.close()


async def test_a_version_with_a_damaged_manifest_is_left_out_and_its_neighbours_are_not(
    tmp_path: Path,
) -> None:
    registry, database = await open_registry(tmp_path)
    for number in (1, 2, 3):
        await registry.publish(export(tmp_path / f"e{number}"), name="cells", job_id=f"{number}", metrics={})
    await registry.set_alias("cells", "prod", 2)
    database.close()
    (tmp_path / "models" / "cells" / "2" / MANIFEST).write_text('{"architecture": ')

    registry, database = await open_registry(tmp_path)
    assert [model.version for model in await registry.models()] == [3, 1]
    assert await registry.aliases() == {}
    database.close()


@pytest.mark.parametrize("damage", ['{"prod": ', "[1]", '{"prod": "new"}', '{"..": 1}', "\udcff"])
async def test_damaged_aliases_are_set_aside_and_taken_from_the_index(tmp_path: Path, damage: str) -> None:
    registry, database = await open_registry(tmp_path)
    for number in ("1", "2"):
        await registry.publish(export(tmp_path / number), name="cells", job_id=number, metrics={})
    await registry.set_alias("cells", "prod", 1)
    database.close()
    aliases = tmp_path / "models" / "cells" / "aliases.json"
    aliases.write_text(damage, errors="surrogateescape")

    registry, database = await open_registry(tmp_path)
    assert await registry.aliases() == {"cells": {"prod": 1}}
    assert json.loads(aliases.read_text()) == {"prod": 1}
    assert aliases.with_name("aliases.json.damaged").exists()
    await registry.set_alias("cells", "next", 2)
    assert (await registry.find(Reference.parse("cells@next"))).version == 2
    database.close()


async def test_damaged_aliases_without_an_index_are_lost_and_the_models_are_not(tmp_path: Path) -> None:
    registry, database = await open_registry(tmp_path)
    await registry.publish(export(tmp_path / "e"), name="cells", job_id="1", metrics={})
    await registry.set_alias("cells", "prod", 1)
    database.close()
    (tmp_path / "cliptune.db").unlink()
    (tmp_path / "models" / "cells" / "aliases.json").write_text("{")
    registry, database = await open_registry(tmp_path)
    assert await registry.aliases() == {}
    assert [model.key for model in await registry.models()] == ["cells:1"]
    database.close()


async def test_the_number_of_a_deleted_version_is_not_given_again(registry: Registry, tmp_path: Path) -> None:
    for number in (1, 2):
        await registry.publish(export(tmp_path / f"e{number}"), name="cells", job_id=f"{number}", metrics={})
    await registry.delete(await registry.find(Reference.parse("cells:2")))
    with pytest.raises(ModelNotFoundError):
        await registry.find(Reference.parse("cells:2"))
    model = await registry.publish(export(tmp_path / "e3"), name="cells", job_id="3", metrics={})
    assert model.version == 3


async def test_a_version_that_an_alias_names_is_not_deleted(registry: Registry, tmp_path: Path) -> None:
    model = await registry.publish(export(tmp_path / "e"), name="cells", job_id="1", metrics={})
    await registry.set_alias("cells", "prod", 1)
    with pytest.raises(ModelStateError, match="cells@prod"):
        await registry.delete(model)
    await registry.delete_alias("cells", "prod")
    with pytest.raises(ModelNotFoundError):
        await registry.delete_alias("cells", "prod")
    await registry.delete(model)
    assert await registry.models() == []


async def test_whoever_looks_for_what_is_not_there_is_told_what_is(
    registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing is published yet"):
        await registry.find(Reference.parse("cells"))
    for number in ("1", "2"):
        await registry.publish(export(tmp_path / number), name="cells", job_id=number, metrics={})
    await registry.set_alias("cells", "prod", 1)
    for missing in ("cells:9", "cells@canary"):
        with pytest.raises(ModelNotFoundError, match=f"{missing}; there is cells:1, cells:2, cells@prod"):
            await registry.find(Reference.parse(missing))
    with pytest.raises(ModelNotFoundError, match=r"no model moons; there is cells$"):
        await registry.find(Reference.parse("moons"))


async def test_an_alias_stands_in_the_files_and_in_the_index(registry: Registry, tmp_path: Path) -> None:
    await registry.publish(export(tmp_path / "e"), name="cells", job_id="1", metrics={})
    await registry.set_alias("cells", "prod", 1)
    assert json.loads((tmp_path / "models" / "cells" / "aliases.json").read_text()) == {"prod": 1}
    assert await registry.aliases() == {"cells": {"prod": 1}}


@pytest.mark.parametrize(
    "name", ["", ".hidden", "..", "a/b", "a b", "-x", "ä", "x" * 65, "a:1", "a@b", "a\n"]
)
def test_a_name_that_could_leave_its_folder_or_be_misread_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError):
        check_name(name)


@pytest.mark.parametrize("text", ["", "a:", "a:x", "a:-1", "a:1.0", "a@", "@b", "a@b@c", "a:1:2", "a:²"])
def test_a_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError):
        Reference.parse(text)


@pytest.mark.parametrize("text", ["a", "a:3", "a@prod", "a.b-c_d:12"])
def test_a_reference_is_written_as_it_was_read(text: str) -> None:
    assert str(Reference.parse(text)) == text


# Publishes version after version, and says each one's number when it is there.
PUBLISHER = """
import sys
from pathlib import Path
from cliptune_server.catalog.model_files import ModelFiles
from tests.server.catalog.test_registry import export
root = Path(sys.argv[1])
for number in range(1000):
    folder = export(root / f"export-{sys.argv[2]}-{number}")
    files = ModelFiles(root / "models")
    model = files.publish(folder, name="cells", job_id=f"{sys.argv[2]}-{number}", metrics={})
    print(model.version, flush=True)
"""


def test_a_kill_at_any_moment_leaves_only_whole_versions(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path / "models")
    for round_number in range(3):
        before = len(files.versions("cells"))
        command = [sys.executable, "-c", PUBLISHER, str(tmp_path), str(round_number)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
        assert process.stdout is not None
        with process.stdout:
            for _ in range(3 + round_number):
                assert process.stdout.readline()
            # It is somewhere inside the next publication now.
            process.send_signal(signal.SIGKILL)
            process.wait()
        files.clean()
        assert not list((tmp_path / "models" / ".staging").iterdir())
        found = list(files.scan())
        assert len(found) >= before + 3 + round_number
        for model in found:
            assert isinstance(model, PublishedModel), model
            assert (model.path / "open_clip_model.safetensors").read_bytes() == WEIGHTS
        assert [model.version for model in found if isinstance(model, PublishedModel)] == list(
            range(1, len(found) + 1)
        )


def test_what_was_half_copied_or_half_deleted_is_gone_after_a_start(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path / "models")
    files.publish(export(tmp_path / "e"), name="cells", job_id="1", metrics={})
    shutil.copytree(files.path("cells", 1), tmp_path / "models" / ".staging" / "half")
    assert files.clean() == 1
    assert files.versions("cells") == [1]
    assert files.names() == ["cells"]
