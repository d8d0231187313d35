"""The benchmark of quality: that its sides are what they say, and that a run tells all of it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import quality
from bench.domain_sets import DomainSet, lay_ready
from bench.kept_runs import KeptRuns, asked_for
from bench.trained import RECIPE, Judged, Work, general, merged, recipe_metric, starting_point, train
from cliptune.domains import layered
from cliptune.spec import spec_from_mapping
from cliptune_model.clip import build
from cliptune_model.exported import export_model, manifest_of
from cliptune_model.source import ModelSource
from cliptune_trainer.guard.drawings import drawings
from cliptune_trainer.spec import Spec, from_proto

ROWS, SHOTS = 24, 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> DomainSet:
    return lay_ready("elpv", Path(), tmp_path_factory.mktemp("sets"), rows=ROWS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """General pairs."""
    folder = tmp_path_factory.mktemp("general")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for row, picture in enumerate(drawings()[::6]):
            picture.resize((48, 48)).save(folder / f"{row}.png")
            writer.writerow([f"{row}.png", f"drawing {row}"])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("start") / "model"
    clip = build(ModelSource(name="cliptune-test-vit"), seed=1)
    export_model(clip, folder, manifest_of(clip))
    return f"local-dir:{folder}"


def works_of(subject: DomainSet, pairs: Path, model: str, seeds: tuple[int, ...] = (0,)) -> dict[str, Work]:
    made = quality.works(
        subject,
        quality.FEW,
        list(quality.ARMS),
        seeds,
        model=model,
        device="cpu",
        epochs=1,
        judged_by={"drawings": pairs},
        probe=pairs,
    )
    return {work.arm.split("|")[2]: work for work in made}


def typed(spec: Any) -> Spec:
    return from_proto(layered(spec_from_mapping(spec)).spec)


def test_few_rows_are_so_many_of_each_label_and_other_splits_stay(cells: DomainSet) -> None:
    some = quality.few(cells, SHOTS)
    label = cells.about.questions[0].column
    with (some.folder / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter(row[label] for row in rows if row["split"] == "train")
    assert max(counts.values()) == SHOTS
    assert some.rows("val") == cells.rows("val")
    assert some.images == cells.images
    again = quality.few(cells, SHOTS)
    assert (again.folder / "rows.csv").read_text() == (some.folder / "rows.csv").read_text()


def test_sides_differ_in_what_they_compare_and_share_the_rest(
    cells: DomainSet, pairs: Path, start: str
) -> None:
    specs = {
        arm: typed(merged(cells.spec(), work.spec)) for arm, work in works_of(cells, pairs, start).items()
    }
    assert len({(spec.train.epochs, spec.train.batch_size, spec.train.seed) for spec in specs.values()}) == 1
    assert len({spec.data.train for spec in specs.values()}) == 1
    assert {arm for arm, spec in specs.items() if spec.guard.on} == {
        "guard",
        "guard, no data",
        "mean",
        "L2-SP",
    }
    assert {arm for arm, spec in specs.items() if spec.guard.probe} == {"guard", "mean", "L2-SP"}
    assert specs["mean"].guard.ema_decay == 0.99
    assert specs["L2-SP"].guard.l2_sp == 10.0
    assert specs["FLYP"].train.learning_rate == 1e-5
    assert specs["open_clip"].train.weight_decay == 0.2
    assert {arm for arm, spec in specs.items() if spec.adapter} == {"LoRA"}


def test_a_run_is_judged_on_the_domain_and_in_general_and_its_lines_tell_both(
    cells: DomainSet, pairs: Path, start: str
) -> None:
    asked = works_of(cells, pairs, start)
    found: list[Judged] = [train(asked["guard"])]
    assert all(set(one.general) == {"drawings"} for one in found)
    assert 0.0 <= found[0].share <= 1.0
    question = cells.about.questions[0].column
    first = starting_point(cells, start, "cpu")[question, RECIPE][recipe_metric(cells)]
    knew = quality.known(general(build(ModelSource(name=start)), {"drawings": pairs}))
    lines = quality.lines_of(cells, start, quality.FEW, first, knew, found, {})
    assert [line["side"] for line in lines] == ["guard"]
    assert [line["trained %"] for line in lines] == [100.0]
    assert quality.trained_percent(asked["LoRA"]) < 50 < quality.trained_percent(asked["recipe"])
    (line,) = [line for line in quality.over_all(found, {(start, ""): knew}) if line["side"] == "guard"]
    assert line["runs"] == 1


def judged(arm: str, seed: int, value: float) -> Judged:
    metric = quality.recipe_metric(DomainSet(name="elpv", folder=Path(), images=Path()))
    return Judged(
        arm=f"cliptune-mini|{quality.FEW}|{arm}",
        seed=seed,
        subject="elpv",
        test={("label", RECIPE): {metric: value}},
        validation=0.5,
        logit_scale=30.0,
        steps=8,
        step_s=0.1,
        train_s=1.0,
        general={"drawings": {"retrieval/image_to_text_recall@1": 0.2}},
        share=0.4,
    )


def test_runs_are_kept_as_they_end_and_the_table_is_of_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "quality.runs.jsonl"
    first = KeptRuns(path)
    first.add_start(quality.start_key("cliptune-mini"), 0.3)
    first.add_start(quality.start_key("cliptune-mini", "elpv"), 0.25)
    first.add_start(quality.trained_key("cliptune-mini", "LoRA"), 0.7)
    first.add("a", judged("recipe", 0, 0.5))
    first.add("b", judged("LoRA", 0, 0.4))
    with path.open("a") as file:
        file.write('{"asked": "c", "run": {"ar')  # cut off
    again = KeptRuns(path)
    assert again.found == first.found
    assert again.starts == first.starts
    again.add("c", judged("recipe", 1, 0.6))
    lines = {line["side"]: line for line in quality.result_of(KeptRuns(path), None).rows}
    assert lines["recipe"]["seeds"] == 2
    assert lines["recipe"]["start"] == 25.0
    assert lines["LoRA"]["trained %"] == 0.7
    assert lines["LoRA"]["of recipe's gain"] == "60%"
    assert str(lines["recipe"]["general loss"]).startswith("10.00")


def test_a_run_is_the_same_wherever_its_files_lie_and_another_with_other_settings(
    cells: DomainSet, pairs: Path, start: str
) -> None:
    home, moved = pairs.parent, Path("/elsewhere")
    work = works_of(cells, pairs, start)["guard"]
    there = works_of(cells, moved / pairs.name, start)["guard"]
    assert asked_for(work, home) == asked_for(there, moved)
    assert len({asked_for(one, home) for one in works_of(cells, pairs, start).values()}) == len(quality.ARMS)
