"""A model and its similarity: built, exported, loaded again, and never a different one by accident."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from torch.nn import functional as F

from cliptune.errors import ConflictError, InvalidInputError, PathOutsideRootsError, SpecError
from cliptune_model import own_code
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of, read_manifest
from cliptune_model.similarity import similarity_for
from cliptune_model.source import ModelSource
from cliptune_model.zero_shot import class_embeddings

TEXTS = ["a cat", "a photo of a dog", "rust"]
OWN = """
    from cliptune_model.similarity import Bounds, Similarity

    class Halved(Similarity):
        linear = False
        accepts = {"power": Bounds(0.1, 10.0, "what a similarity is raised to")}

        def prepare_images(self, image_ND):
            return image_ND.float()

        def prepare_texts(self, text_MD):
            return text_MD.float()

        def of_products(self, products):
            return 0.5 * products
"""


def compared_by(clip: Clip, name: str, **parameters: float) -> Clip:
    return replace(clip, similarity=similarity_for(name, clip.embedding_dim, parameters))


@torch.no_grad()
def scores(clip: Clip) -> torch.Tensor:
    texts = clip.encode_texts(clip.tokenize(TEXTS))
    found: torch.Tensor = clip.similarity(texts.flip(0), texts)
    return found


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a similarity, in a folder whose code may be run."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "halved.py").write_text(textwrap.dedent(OWN))
    monkeypatch.setenv(own_code.ENVIRONMENT, str(folder))
    return folder / "halved.py"


def test_a_model_is_compared_by_the_cosine_unless_something_else_is_asked_for(clip: Clip) -> None:
    assert clip.similarity.name == "cosine"
    assert not list(clip.similarity.parameters())
    asked = ModelSource(
        name="cliptune-test-vit", similarity="lorentz", similarity_parameters={"curvature": 2.0}
    )
    assert build(asked).similarity.values()["curvature"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["mahalanobis", "lorentz"])
def test_what_a_similarity_has_learned_comes_back_with_the_model(
    clip: Clip, name: str, tmp_path: Path
) -> None:
    compared = compared_by(clip, name)
    with torch.no_grad():
        for one in compared.similarity.parameters():
            one.sub_(0.05)
    export_model(compared, tmp_path / "export", manifest_of(compared))
    manifest = read_manifest(tmp_path / "export")
    assert manifest.similarity == name
    assert manifest.similarity_values == pytest.approx(compared.similarity.values())
    assert torch.equal(scores(load_exported(tmp_path / "export")), scores(compared))

    # Beside the weights, so that open_clip, which loads strictly, does not hear of it.
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'export'}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_text(tokens), compared.encode_texts(compared.tokenize(TEXTS)))


@pytest.mark.parametrize("name", ["cosine", "dot", "lorentz"])
def test_an_export_on_the_hub_brings_its_similarity(
    clip: Clip, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = compared_by(clip, name)
    with torch.no_grad():
        for one in compared.similarity.parameters():
            one.sub_(0.05)
    # As the hub's client keeps a repository; the hub itself is not asked.
    cache = tmp_path / "models--someone--cells"
    export_model(compared, cache / "snapshots" / "c0ffee", manifest_of(compared))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.fspath(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = build(ModelSource(name="hf-hub:someone/cells"))
    assert again.similarity.name == name
    assert torch.equal(scores(again), scores(compared))
    if name == "cosine":
        (cache / "snapshots" / "c0ffee" / "cliptune.json").unlink()  # a model of others
        assert build(ModelSource(name="hf-hub:someone/cells")).similarity.name == "cosine"


def test_a_cliptune_that_knows_only_the_cosine_refuses_a_model_of_another_similarity(
    clip: Clip, tmp_path: Path
) -> None:
    assert manifest_of(clip).format_version == 1
    assert manifest_of(compared_by(clip, "dot")).format_version == 2


def test_a_similarity_that_is_asked_for_begins_anew_where_it_is_another_or_has_parameters(
    clip: Clip, tmp_path: Path
) -> None:
    compared = compared_by(clip, "lorentz", curvature=2.0)
    with torch.no_grad():
        compared.similarity.log_curvature.fill_(1.0)  # type: ignore[operator]
    learned = compared.similarity.values()["curvature"]
    folder = f"local-dir:{tmp_path / 'export'}"
    export_model(compared, tmp_path / "export", manifest_of(compared))

    def curvature(source: ModelSource) -> float | None:
        return build(source).similarity.values().get("curvature")

    assert curvature(ModelSource(name=folder)) == pytest.approx(learned)
    assert curvature(ModelSource(name=folder, similarity="lorentz")) == pytest.approx(learned)
    given = {"curvature": 3.0}
    assert curvature(ModelSource(name=folder, similarity_parameters=given)) == pytest.approx(3.0)
    assert curvature(ModelSource(name=folder, similarity="cosine")) is None


def test_a_model_without_what_its_similarity_has_learned_is_not_loaded(clip: Clip, tmp_path: Path) -> None:
    compared = compared_by(clip, "mahalanobis")
    export_model(compared, tmp_path / "export", manifest_of(compared))
    path = tmp_path / "export" / "cliptune_similarity.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidInputError, match=r"cliptune_similarity.safetensors.*does not load"):
        load_exported(tmp_path / "export")
    path.unlink()
    with pytest.raises(InvalidInputError, match="does not load as mahalanobis"):
        load_exported(tmp_path / "export")


@pytest.mark.parametrize("name", ["cosine", "dot", "lorentz"])
def test_prompts_of_a_class_are_averaged_as_the_similarity_says(clip: Clip, name: str) -> None:
    compared = compared_by(clip, name)
    with torch.no_grad():
        prompts = compared.encode_texts(compared.tokenize(TEXTS))
        unit = F.normalize(F.normalize(prompts, dim=-1).mean(dim=0), dim=0)
        expected = unit if name == "cosine" else prompts.mean(dim=0)
    found = class_embeddings(compared, [("one", TEXTS), ("two", TEXTS[:1])])
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_a_users_own_similarity_comes_back_from_its_file(clip: Clip, own: Path, tmp_path: Path) -> None:
    compared = compared_by(clip, "halved.py:Halved", power=2.0)  # relative to the folder that is allowed
    assert compared.similarity.name == f"{own}:Halved"
    export_model(compared, tmp_path / "export", manifest_of(compared))
    again = load_exported(tmp_path / "export")
    assert again.similarity.parameters_given == {"power": 2.0}
    torch.testing.assert_close(scores(again), scores(compared))
    assert json.loads((tmp_path / "export" / "cliptune.json").read_text())["similarity_sha256"]


def test_a_model_whose_similarity_has_changed_since_is_not_loaded(
    clip: Clip, own: Path, tmp_path: Path
) -> None:
    compared = compared_by(clip, f"{own}:Halved")
    export_model(compared, tmp_path / "export", manifest_of(compared))
    own.write_text(own.read_text().replace("0.5 * products", "0.25 * products"))
    with pytest.raises(ConflictError, match="put that file back"):
        load_exported(tmp_path / "export")
    own.unlink()
    with pytest.raises(ConflictError, match=r"cannot be had.*no file"):
        load_exported(tmp_path / "export")


def test_no_file_is_run_unless_the_owner_allows_its_folder(
    clip: Clip, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text("raise SystemExit('it was run')")
    (own.parent / "link.py").symlink_to(elsewhere)
    for reference in (f"{elsewhere}:X", "../elsewhere.py:X", "link.py:X"):
        with pytest.raises(PathOutsideRootsError, match="outside the folders"):
            compared_by(clip, reference)
    monkeypatch.delenv(own_code.ENVIRONMENT)
    with pytest.raises(PathOutsideRootsError, match="serve --allow-code"):
        compared_by(clip, f"{own}:Halved")


def test_a_model_folder_brings_no_code(
    clip: Clip, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = compared_by(clip, f"{own}:Halved")
    export_model(compared, tmp_path / "export", manifest_of(compared))
    monkeypatch.setenv(own_code.ENVIRONMENT, "")
    with pytest.raises(ConflictError, match=r"cannot be had.*runs no code of files"):
        load_exported(tmp_path / "export")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_of_this_name", "does not load: ModuleNotFoundError"),
        ("exit()", "does not load: RuntimeError: it ends the process"),
        ("def (", "does not load: SyntaxError"),
        ("Halved = 7", "cannot be made for 64 dimensions: TypeError"),
        ("def Halved(dim, parameters): return dim", "makes a int; allowed: a subclass"),
        ("def Other(): pass", "has no 'Halved'; allowed: Other"),
    ],
)
def test_code_that_makes_no_similarity_is_told_so(own: Path, text: str, told: str) -> None:
    own.write_text(text)
    with pytest.raises(SpecError, match=told):
        similarity_for(f"{own}:Halved", 64)


def test_an_installed_similarity_goes_by_its_entry_point(
    clip: Clip, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    described = site / "halving-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[cliptune.similarities]\nhalf = halving_similarity:Halved\n")
    (site / "halving_similarity.py").write_text(own.read_text())
    monkeypatch.syspath_prepend(os.fspath(site))
    monkeypatch.delenv(own_code.ENVIRONMENT)  # no need of it: whoever installed it allowed it

    compared = compared_by(clip, "half")
    assert compared.similarity.name == "half"
    export_model(compared, tmp_path / "export", manifest_of(compared))
    torch.testing.assert_close(scores(load_exported(tmp_path / "export")), scores(compared))
    with pytest.raises(SpecError, match=r"did you mean 'half'\?"):
        similarity_for("halff", 64)
