"""The rate that is chosen, and settings that destroy what a pretrained model knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cliptune.domains import layered, recipe
from cliptune.errors import SpecError
from cliptune.spec_shape import validate_shape
from cliptune.v1 import job_pb2, spec_pb2
from cliptune_model.adapters import AdapterConfig, Attached, BaseIdentity
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.table import Pair
from cliptune_trainer.image.augment import NAMED, NONE, Augmentation
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.plan.cautions import settings_to_mind
from cliptune_trainer.plan.learning_rate import choose_learning_rate, weight_size
from cliptune_trainer.preflight import prepare
from cliptune_trainer.remark import Remark
from cliptune_trainer.reporting.events import Reporter
from cliptune_trainer.reporting.journal import Journal
from cliptune_trainer.spec import DataConfig, Spec, TrainConfig, from_proto
from tests.trainer.conftest import MakeJob
from tests.trainer.jobs import TrainerJob

Caution = Callable[..., list[Remark]]


@pytest.fixture(scope="module")
def pretrained() -> Clip:
    """Of the weights of a ViT-B-32's size."""
    clip = build(ModelSource(name="cliptune-test-vit"), seed=1)
    with torch.no_grad():
        factor = 0.024 / weight_size(clip.model)
        for weight in clip.model.parameters():
            if weight.ndim >= 2:
                weight.mul_(factor)
        clip.model.logit_scale.fill_(4.6052)  # type: ignore[operator,union-attr]
    return replace(clip, pretrained=True)


def pairs(*captions: str) -> Pairs:
    return Pairs(
        [
            Pair(row=row, image=Path(f"{row}.png"), reference=f"{row}.png", caption=caption)
            for row, caption in enumerate(captions or ("a cell", "a stain"), start=1)
        ]
    )


@pytest.fixture
def cautions(pretrained: Clip) -> Caution:
    def told(
        *captions: str,
        clip: Clip = pretrained,
        augment: Augmentation = NONE,
        loss: LossConfig | None = None,
        steps: int = 1000,
        model: str = "m",
        **train: Any,
    ) -> list[Remark]:
        spec = Spec(
            name="a",
            model=ModelSource(name=model),
            data=DataConfig(train="a.csv", augment=augment),
            train=TrainConfig(**{"learning_rate": 1e-5, **train}),
            loss=loss or LossConfig(),
        )
        return settings_to_mind(
            spec,
            clip,
            pairs(*captions),
            learning_rate=spec.train.learning_rate or 0.0,
            usual=1e-5,
            total_steps=steps,
        )

    return told


def codes(remarks: list[Remark]) -> list[str]:
    return [remark.code for remark in remarks]


def test_the_chosen_rate_is_the_published_one_and_falls_with_few_rows(pretrained: Clip) -> None:
    def rate(rows: int, steps: int, clip: Clip = pretrained) -> float:
        return float(choose_learning_rate(clip, rows=rows, total_steps=steps).value)

    assert rate(100_000, 8000) == pytest.approx(1e-5, rel=0.05)
    assert rate(100, 2000) == pytest.approx(3.2e-6, rel=0.05)
    assert rate(2, 100_000) == 1e-6
    assert rate(5000, 100) == pytest.approx(3e-5, rel=0.05)  # few steps; as WiSE-FT
    assert rate(10, 2000) < rate(100, 2000) < rate(1000, 2000) == rate(10_000, 2000)
    assert rate(50, 1, clip=replace(pretrained, pretrained=False)) == 5e-4


def test_the_chosen_rate_tells_its_reasons_and_grows_with_the_weights(pretrained: Clip) -> None:
    choice = choose_learning_rate(pretrained, rows=250, total_steps=4000)
    assert choice.reason == "the weights are pretrained and about 0.024 large; 250 rows are few: × 0.5"
    larger = build(ModelSource(name="cliptune-test-vit"), seed=1)
    assert weight_size(larger.model) > 2 * weight_size(pretrained.model)
    more = choose_learning_rate(replace(larger, pretrained=True), rows=5000, total_steps=4000)
    assert float(more.value) == pytest.approx(4.2e-4 * weight_size(larger.model), rel=0.05)


@pytest.mark.parametrize(("kind", "usual", "most"), [("lora", 2e-4, 25), ("bottleneck", 3e-4, 10)])
def test_an_adapter_s_rate_rises_with_the_steps_that_are_missing_since_it_begins_as_nothing(
    pretrained: Clip, kind: str, usual: float, most: float
) -> None:
    base = BaseIdentity(source=ModelSource(name="cliptune-test-vit"), seed=0, sha256="0" * 64)
    clip = replace(pretrained, adapter=Attached(config=AdapterConfig(kind=kind), base=base, layers=()))

    def rate(steps: int) -> float:
        return float(choose_learning_rate(clip, rows=100, total_steps=steps).value)

    assert rate(1000) == rate(8000) == usual
    assert rate(200) == pytest.approx(5 * usual)
    assert rate(3) == rate(40) == pytest.approx(most * usual)
    reason = choose_learning_rate(clip, rows=100, total_steps=200).reason
    assert reason == f"usual for adapters: {kind}; 200 steps are few, and it begins as nothing: × 5"


def test_usual_settings_are_not_remarked_upon(cautions: Caution) -> None:
    assert cautions() == []
    assert cautions("a cell on the left", "two cells", "a red cell") == []


def test_a_rate_as_large_as_the_weights_is_refused(cautions: Caution, pretrained: Clip) -> None:
    with pytest.raises(SpecError, match=r"nothing of them is left.*below 0\.024") as caught:
        cautions(learning_rate=0.03)
    assert caught.value.metadata["path"] == "train.learning_rate"
    assert codes(cautions(learning_rate=0.03, clip=replace(pretrained, pretrained=False))) == []


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"learning_rate": 5e-4}, "learning-rate-high", "1e-05 is the usual one"),
        ({"learning_rate": 5e-5, "warmup_fraction": 0.0}, "no-warmup", "first steps"),
        ({"warmup_fraction": 0.9}, "long-warmup", "before the learning rate reaches its peak"),
        ({"weight_decay": 10.0, "steps": 5000}, "weight-decay-strong", "of every weight away"),
        ({"loss": LossConfig(logit_scale=14.3)}, "logit-scale-reset", "trained to 100"),
        ({"loss": LossConfig(max_logit_scale=20.0)}, "logit-scale-reset", "far below the 100"),
    ],
)
def test_settings_of_a_pretraining_are_warned_of_where_there_is_something_to_forget(
    cautions: Caution, pretrained: Clip, settings: dict[str, Any], code: str, says: str
) -> None:
    (remark,) = cautions(**settings)
    assert remark.code == code
    assert remark.warning
    assert says in remark.message
    assert cautions(clip=replace(pretrained, pretrained=False), **settings) == []


def test_another_similarity_than_the_model_was_trained_by_is_told(cautions: Caution) -> None:
    clip = build(ModelSource(name="cliptune-test-vit", similarity="dot"))
    (remark,) = cautions(clip=replace(clip, pretrained=True), loss=LossConfig(max_logit_scale=14.0))
    assert remark.code == "similarity-changed"
    assert "trained by cosine" in remark.message


@pytest.mark.parametrize(
    ("caption", "augment"),
    [
        ("nodule in the left lung", Augmentation(flip_horizontal=True)),
        ("nodule in the left lung", Augmentation(rotate_quarter=True)),
        ("scratch near the upper edge", Augmentation(flip_vertical=True)),
        ("an arrow above a line", Augmentation(rotate_degrees=180.0)),
        ("a red car", Augmentation(hue=0.2)),
        ("a field with 19 red blood cells", NAMED["crop"]),
        ("many small nuclei", Augmentation(crop_min_area=0.8)),
    ],
)
def test_a_change_that_makes_captions_untrue_is_told_with_the_rows(
    cautions: Caution, caption: str, augment: Augmentation
) -> None:
    (remark,) = cautions("a cell", caption, "a stain", augment=augment)
    assert remark.code == "augmentation-contradicts-captions"
    assert "1 training captions" in remark.message
    assert "rows 2;" in remark.message
    assert cautions("a cell", "bright leftover from 2019, number 3", augment=augment) == []


def test_captions_made_from_labels_are_looked_through_as_well(pretrained: Clip) -> None:
    (pair,) = pairs("a lung").pairs
    train = Pairs([replace(pair, variants=("a lung", "the left lung"))])
    spec = from_proto(_message("medical"))
    spec = replace(spec, data=replace(spec.data, augment=NAMED["flip"]))
    (remark,) = settings_to_mind(spec, pretrained, train, learning_rate=1e-5, usual=1e-5, total_steps=9)
    assert "rows 1;" in remark.message


@pytest.mark.parametrize("name", ["medical", "scientific", "industrial", "general"])
def test_no_recipe_contradicts_the_captions_of_its_domain(cautions: Caution, name: str) -> None:
    captions = {
        "medical": "opacity in the left upper lobe, 3 nodules; purple stain",
        "scientific": "many bright small nuclei, two channels, green",
        "industrial": "a red part with two holes",
        "general": "a red car to the left of two houses, above a road",
    }
    spec = from_proto(_message(name))
    assert cautions(captions[name], augment=spec.data.augment) == []


def test_defaults_written_for_clients_are_those_that_the_trainer_takes() -> None:
    bare = spec_pb2.JobSpec(name="a", model={"name": "m"}, data={"train": "a.csv"})
    assert from_proto(layered(bare).spec) == from_proto(bare)


def _message(domain: str) -> Any:
    message = recipe(domain)
    message.name, message.model.name, message.data.train = "a", "m", "a.csv"
    return message


def plan_of(job: TrainerJob) -> job_pb2.JobPlan:
    journal = Journal(job.folder.journal(0), 0)
    try:
        prepare(job.folder, [job.root], Reporter(journal))
    finally:
        journal.close()
    return next(event.event.plan for event in job.journal(0) if event.event.HasField("plan"))


def test_a_plan_tells_the_whole_spec_as_it_will_run_and_what_the_domain_brought(
    make_job: MakeJob,
) -> None:
    job = make_job(data={"augmentation": ""})
    file = job.path / "spec.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "domain": "industrial"}))
    plan = plan_of(job)
    brought = recipe("industrial")
    assert plan.spec.data.augment == brought.data.augment
    assert plan.spec.loss.name == brought.loss.name
    assert list(plan.spec.evaluation.prompt_templates) == list(brought.evaluation.prompt_templates)
    assert plan.spec.train.learning_rate == 1e-3  # asked for
    assert plan.spec.train.schedule == "cosine"  # a default
    assert plan.spec.train.precision == plan.precision  # chosen
    assert plan.spec.train.batch_size == plan.batch_size
    assert [entry.label for entry in plan.spec.evaluation.classes] == ["blue", "green", "red"]
    assert "a cropped photo of the blue." in plan.spec.evaluation.classes[0].prompts
    assert plan.spec.evaluation.main_metric == "zero_shot/average_precision"
    assert plan.spec.publish.model == "job"
    told = {made.subject: made for made in plan.decisions}
    assert told["data.augment"].choice.startswith("flip_horizontal, flip_vertical, crop_min_area 0.9")
    assert told["data.augment"].reason.startswith("domain industrial: a part lies either way up")
    assert told["loss.name"].choice == "multi_positive"

    again = make_job("again")
    spec = json.loads((again.path / "spec.json").read_text())
    assert spec["name"] == "again"
    (again.path / "spec.json").write_text(_json(plan.spec))
    rerun = plan_of(again)
    assert rerun.spec == plan.spec
    validate_shape(plan.spec)


def test_what_a_domain_would_rather_measure_gives_way_where_there_are_no_labels(make_job: MakeJob) -> None:
    job = make_job(data={"augmentation": "", "label_column": ""})
    file = job.path / "spec.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "domain": "industrial"}))
    assert plan_of(job).spec.evaluation.main_metric == "retrieval/image_to_text_recall@1"
    insisting = {**written, "evaluation": {"main_metric": "zero_shot/average_precision"}}
    file.write_text(json.dumps(insisting))
    with pytest.raises(SpecError, match="which the labels of the validation rows do not tell"):
        plan_of(job)


def _json(message: Any) -> str:
    from google.protobuf import json_format

    return str(json_format.MessageToJson(message, preserving_proto_field_name=True))


def test_what_a_job_asks_for_holds_over_its_domain_when_it_runs(make_job: MakeJob) -> None:
    job = make_job(loss={"name": "infonce"})
    file = job.path / "spec.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "domain": "medical"}))
    spec = job.folder.spec()
    assert spec.loss.names == ("infonce",)
    assert spec.data.augment == NAMED["crop"]
    assert spec.evaluation.prompt_templates == tuple(recipe("medical").evaluation.prompt_templates)
