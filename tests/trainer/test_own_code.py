"""Users' own losses and similarities: what is promised is tried out, and what is broken is told."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cliptune.errors import ConflictError, PathOutsideRootsError, SpecError
from cliptune_model import own_code
from cliptune_model.similarity import SIMILARITIES, Similarity, SquaredEuclidean, similarity_for
from cliptune_trainer.contract import (
    check_own_code,
    remember_own_code,
    try_loss,
    try_own_code,
    try_similarity,
)
from cliptune_trainer.losses.catalog import LOSSES
from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.losses.contrast import Contrast
from cliptune_trainer.losses.own import declares
from cliptune_trainer.preflight import prepare
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from tests.trainer.conftest import MakeJob

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "your-own-loss.md"
DIM = 16


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose code may be run, with the files of the guide."""
    folder = tmp_path / "code"
    folder.mkdir()
    for block in blocks("python"):
        if named := re.match(r"# (\w+\.py)\n", block):
            (folder / named[1]).write_text(block)
    monkeypatch.setenv(own_code.ENVIRONMENT, str(folder))
    return folder


def own(name: str, similarity: str = "cosine", **parameters: float) -> str:
    """What the plan says of a loss."""
    config = LossConfig(terms=(Term(name=name, parameters=parameters),))
    choices = try_own_code(config, similarity_for(similarity, DIM))
    return "\n".join(f"{choice.subject} {choice.value}: {choice.reason}" for choice in choices)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("similarity", ["cosine", "lorentz"])
def test_the_losses_of_cliptune_keep_the_promises_of_users_losses(name: str, similarity: str) -> None:
    report = try_loss(LOSSES[name].function, similarity_for(similarity, DIM), needs=LOSSES[name].needs)
    assert "gradient as finite differences" in report.choice("loss", "ours").reason


@pytest.mark.parametrize("name", SIMILARITIES)
def test_the_similarities_of_cliptune_keep_the_promises_of_users_similarities(name: str) -> None:
    assert "finite" in try_similarity(similarity_for(name, DIM)).choice("similarity", "ours").reason


def test_the_guides_own_loss_and_similarity_keep_their_promises(code: Path) -> None:
    told = own("focal.py:focal", "heavy_tailed.py:HeavyTailed", gamma=1.5)
    assert f"own similarity {code / 'heavy_tailed.py'}:HeavyTailed: " in told
    assert "learns log_degrees" in told
    assert "own loss focal.py:focal: " in told
    assert "exact in parts (to " in told


def test_the_guides_broken_loss_is_told_as_the_guide_says(code: Path) -> None:
    def without_numbers(text: str) -> str:
        return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", text.strip())

    (told,) = blocks("text")
    with pytest.raises(SpecError) as caught:
        own("broken.py:broken")
    assert without_numbers(str(caught.value)) == without_numbers(told)
    assert caught.value.metadata["path"] == "loss.name"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("return contrast.logits().diagonal()", r"one number: it returns a tensor of shape \[8\]"),
        ("return 3.0", "one number: it returns a float"),
        ("return contrast.logits().mean().detach()", "differentiable: no gradient leads back"),
        ("return contrast.image_NP.sum()", "differentiable: no gradient reaches the texts"),
        (
            "return contrast.logits().exp().sum().log()",
            "finite: the loss where all .* are equal holds inf",
        ),
        (
            "return contrast.logits().diagonal().std() / contrast.similarities().std()",
            "finite: .* equal holds",
        ),
        ("SEEN.append(1); return contrast.logits().mean() * len(SEEN)", "pure: .* remembers batches"),
        ("contrast.image_NP.data.mul_(2); return contrast.logits().mean()", "pure: it changes the contrast"),
        ("x = contrast.logits(); return (x * x.detach()).mean()", "finite differences: slopes differ by"),
        ("return contrast.missing", "one number: it raises AttributeError: .*missing"),
        ("return contrast.identities.labels().sum()", "one number: it raises ValueError: .*by labels"),
    ],
)
def test_a_loss_that_breaks_a_promise_is_refused_with_that_promise(code: Path, text: str, told: str) -> None:
    (code / "mine.py").write_text(f"SEEN = []\ndef loss(contrast):\n    {text}\n")
    with pytest.raises(SpecError, match=told):
        own("mine.py:loss")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def loss(): pass", "cannot be called with a contrast"),
        ("def loss(*, contrast=1.0): pass", "takes no contrast as its first argument"),
        ("def loss(contrast, margin=0.2): pass", "'margin' that is no number by keyword"),
        ("def loss(contrast, *, margin): pass", "'margin' that is no number by keyword"),
        ("def loss(contrast, **more): pass", "'more' that is no number by keyword"),
        ("loss = declares(needs=['label'])(lambda contrast: 0)", "declares a need of label"),
        ("loss = declares(ranges={'m': (0, 1)})(lambda contrast: 0)", "a range of 'm'"),
        ("1 / 0", "does not load: ZeroDivisionError"),
    ],
)
def test_code_that_is_no_loss_by_its_form_is_told_so(code: Path, text: str, told: str) -> None:
    (code / "form.py").write_text(f"from cliptune_trainer.losses.own import declares\n{text}\n")
    with pytest.raises(SpecError, match=told):
        own("form.py:loss")


def test_parameters_of_an_own_loss_are_checked_as_those_of_any_loss(code: Path) -> None:
    with pytest.raises(SpecError, match=r"gama is no parameter .*did you mean 'gamma'\?"):
        own("focal.py:focal", gama=1.5)
    with pytest.raises(SpecError, match=r"loss\.parameters\.gamma is 0\.5; allowed: 1 to 10"):
        own("focal.py:focal", gamma=0.5)


def test_an_unknown_loss_is_offered_the_nearest_names_and_a_file_outside_is_refused(
    code: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"did you mean 'infonce'\?.*or FILE\.py:NAME"):
        own("infonec")
    (tmp_path / "outside.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(PathOutsideRootsError, match="outside the folders"):
        own("../outside.py:loss")


def test_an_installed_loss_goes_by_its_entry_point_and_may_need_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    described = site / "labelled-2.5.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: labelled\nVersion: 2.5\n")
    (described / "entry_points.txt").write_text("[cliptune.losses]\nlabelled = labelled_loss:loss\n")
    (site / "labelled_loss.py").write_text(
        "from cliptune_trainer.losses.own import declares\n"
        "@declares(needs={'labels'})\n"
        "def loss(contrast, *, weight=1.0):\n"
        "    return weight * (contrast.similarities() - contrast.identities.alike()).square().mean()\n"
    )
    monkeypatch.syspath_prepend(os.fspath(site))
    assert "labelled 2.5" in own("labelled", weight=0.5)
    assert LossConfig(terms=(Term(name="labelled"),)).needs == {"labels"}


def test_a_job_with_a_loss_that_breaks_promises_ends_while_it_is_prepared(
    code: Path, make_job: MakeJob
) -> None:
    job = make_job(loss={"name": "broken.py:broken"}, model={"similarity": "squared_euclidean"})
    with (
        closing(Journal(job.folder.journal(0), 0)) as journal,
        pytest.raises(SpecError, match=r"loss\.name: broken\.py:broken is not a loss"),
    ):
        prepare(job.folder, [job.root], Reporter(journal))
    assert "plan" not in job.kinds(0)


def test_a_job_goes_on_only_with_the_code_that_was_tried_out(code: Path, tmp_path: Path) -> None:
    record = tmp_path / "own-code.json"
    plain = LossConfig()
    remember_own_code(record, plain, "lorentz")
    assert not record.exists()
    check_own_code(record, plain, "lorentz")

    own_loss, similarity = LossConfig(terms=(Term(name="focal.py:focal"),)), "heavy_tailed.py:HeavyTailed"
    remember_own_code(record, own_loss, similarity)
    check_own_code(record, own_loss, similarity)
    for name, path in (("focal.py", "loss.name"), ("heavy_tailed.py", "model.similarity")):
        text = (code / name).read_text()
        (code / name).write_text(f"{text}\n# another\n")
        with pytest.raises(ConflictError, match=f"{path}: the job was prepared with .*{name}, sha256"):
            check_own_code(record, own_loss, similarity)
        (code / name).write_text(text)
    check_own_code(record, own_loss, similarity)


def test_a_stopped_gradient_is_allowed_where_it_is_declared() -> None:
    def stopped(contrast: Contrast) -> Tensor:
        logits_NN = contrast.logits()
        return (logits_NN * logits_NN.detach()).mean()

    with pytest.raises(SpecError, match="stopped is not a loss"):
        try_loss(stopped, similarity_for("cosine", DIM)).choice("loss", "made by hand")
    declared = declares(stops_gradient=True)(stopped)
    assert "exact in parts" in try_loss(declared, similarity_for("cosine", DIM)).choice("loss", "").reason


class Bad(SquaredEuclidean):
    """A similarity with one fault, by name."""

    fault = ""
    linear = False

    def prepare_images(self, image: Tensor) -> Tensor:
        prepared = super().prepare_images(image)
        if self.fault == "batch":
            return prepared - prepared.mean(dim=0)
        if self.fault == "shape":
            return prepared[:, 1:]
        return prepared.float() if self.fault == "format" else prepared

    def of_products(self, products: Tensor) -> Tensor:
        faults: dict[str, Callable[[Tensor], Tensor]] = {
            "distance": torch.neg,
            "root": lambda p: -p.neg().sqrt(),
            "table": lambda p: p - p.mean(),
            "detached": lambda p: p * p.detach(),
            "cut": torch.detach,
            "drawn": lambda p: p * self.drawn,
        }
        return faults.get(self.fault, partial(torch.mul, 2.0))(products)

    def __init__(self, dim: int, parameters: dict[str, float] | None = None) -> None:
        super().__init__(dim, parameters)
        self.drawn = torch.rand(()).item()


class WronglyUnit(Bad):
    unit = True


class WronglyLinear(Bad):
    linear = True


@pytest.mark.parametrize(
    ("kind", "fault", "told"),
    [
        (Bad, "shape", r"shapes: it prepares \[6, 17\] for images and \[5, 18\] for texts"),
        (Bad, "format", "shapes: .*"),
        (Bad, "batch", "row by row: a row prepared alone differs"),
        (Bad, "table", "number by number: of_products of a table"),
        (Bad, "distance", "more alike is more: .* is it a distance"),
        (Bad, "root", "finite: .* holds (nan|inf|-inf)"),
        (Bad, "detached", "gradient as finite differences: slopes differ"),
        (Bad, "cut", "differentiable: no gradient leads back"),
        (Bad, "drawn", "the same from its saved state: scores differ"),
        (WronglyUnit, "", "`unit` is True, but lengths matter"),
        (WronglyLinear, "", "`linear` is True, but of_products changes"),
    ],
)
def test_a_similarity_that_breaks_a_promise_is_refused_with_that_promise(
    kind: type[Bad], fault: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIMILARITIES, "bad", kind)
    monkeypatch.setattr(kind, "name", "bad")
    monkeypatch.setattr(Bad, "fault", fault)
    similarity: Similarity = kind(DIM)
    with pytest.raises(SpecError, match=told):
        try_similarity(similarity).choice("similarity", "made by hand")
