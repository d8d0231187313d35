"""A split measured whole: against CLIP_benchmark's definitions, with several labels, with intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.nn import functional as F

from cliptune.evaluation import Interval
from cliptune.metric_names import MAIN_METRICS
from cliptune_model.clip import Clip, build
from cliptune_model.source import ModelSource
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.table import Pair
from cliptune_trainer.evaluation import EvaluationInterrupted, evaluate
from cliptune_trainer.evaluation.bootstrap import intervals
from cliptune_trainer.evaluation.metrics import Booleans, Floats, share
from cliptune_trainer.evaluation.truth import Truth
from cliptune_trainer.evaluation.units import Units
from cliptune_trainer.spec import ClassConfig

COLOURS = ("red", "green", "blue")
CLASSES = tuple(ClassConfig(label=label, prompts=(f"a {label} tile",)) for label in COLOURS)


def rows(tiles: Path) -> Pairs:
    """Twenty images of three colours, two captions an image, six captions in all."""
    return Pairs(
        [
            Pair(
                row=row,
                image=tiles / f"{row // 2}.png",
                reference="",
                caption=f"a {COLOURS[row // 2 % 3]} tile, number {row % 2}",
                labels=(COLOURS[row // 2 % 3],),
                group=f"g{row // 8}",
            )
            for row in range(40)
        ]
    )


def several(tiles: Path) -> Pairs:
    """Images of several findings and of none."""
    labels = [("red", "dark"), ("red",), (), ("dark",), ("green",), ("red", "dark", "odd")]
    return Pairs(
        [
            Pair(
                row=row,
                image=tiles / f"{row}.png",
                reference="",
                caption=f"tile {row}",
                labels=labels[row % 6],
            )
            for row in range(24)
        ]
    )


# What CLIP_benchmark computes for its tasks zeroshot_classification and zeroshot_retrieval, written as there.


def benchmark_classifier(clip: Clip, templates: tuple[str, ...], names: tuple[str, ...]) -> Tensor:
    columns = []
    for name in names:
        texts = clip.tokenize([template.format(c=name) for template in templates])
        mean = F.normalize(clip.encode_texts(texts), dim=-1).mean(dim=0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def benchmark_accuracy(logits: Tensor, target: Tensor, k: int) -> float:
    pred = logits.topk(k, 1, True, True)[1].t()
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    return float(correct[:k].reshape(-1).float().sum()) / len(target)


def benchmark_recall(scores: Tensor, positive_pairs: Tensor, k: int) -> float:
    topk = torch.topk(scores, k, dim=1)[1]
    one_hot = F.one_hot(topk, num_classes=scores.shape[1])
    true_positives = (one_hot * positive_pairs.view(len(scores), 1, -1)).sum(dim=(1, 2))
    return float((true_positives / positive_pairs.sum(dim=1) > 0).float().mean())


def benchmark_average_precision(scores: Tensor, targets: Tensor) -> float:
    each = torch.zeros(scores.size(1))
    places = torch.arange(1, scores.size(0) + 1).float()
    for k in range(scores.size(1)):
        _, order = torch.sort(scores[:, k], 0, True)
        truth = targets[:, k][order]
        precision = truth.float().cumsum(0).div(places)
        each[k] = precision[truth.bool()].sum() / max(float(truth.sum()), 1)
    return float(each.mean())


@torch.no_grad()
def images_of(clip: Clip, paths: list[Path]) -> Tensor:
    from PIL import Image

    pixels = torch.stack([clip.preprocess(Image.open(path)) for path in paths])
    return F.normalize(clip.encode_images(pixels), dim=-1)


@torch.no_grad()
def test_zero_shot_classification_equals_clip_benchmark(clip: Clip, tiles: Path) -> None:
    names = ("red", "green", "blue", "grey", "cyan", "pink")
    templates = ("a {c} tile", "{c}")
    target = torch.tensor([row % 6 for row in range(60)])
    logits = (
        100.0
        * images_of(clip, [tiles / f"{row}.png" for row in range(60)])
        @ benchmark_classifier(clip, templates, names)
    )
    pairs = Pairs(
        [
            Pair(
                row=row,
                image=tiles / f"{row}.png",
                reference="",
                caption=f"tile {row}",
                labels=(names[row % 6],),
            )
            for row in range(60)
        ]
    )
    classes = [
        ClassConfig(label=name, prompts=tuple(template.format(c=name) for template in templates))
        for name in names
    ]
    metrics = evaluate(clip, pairs, classes, batch_size=32).metrics
    assert metrics["zero_shot/accuracy"] == pytest.approx(benchmark_accuracy(logits, target, 1))
    assert metrics["zero_shot/accuracy@5"] == pytest.approx(benchmark_accuracy(logits, target, 5))
    assert metrics["zero_shot/balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(target, logits.argmax(dim=1))
    )


@torch.no_grad()
def test_zero_shot_with_several_labels_equals_clip_benchmark(clip: Clip, tiles: Path) -> None:
    names = ("red", "dark", "green")
    pairs = several(tiles)
    target = torch.tensor([[name in pair.labels for name in names] for pair in pairs.pairs])
    images = images_of(clip, [tiles / f"{row}.png" for row in range(24)])
    logits = 100.0 * images @ benchmark_classifier(clip, ("a {c} tile",), names)
    classes = [ClassConfig(label=name, prompts=(f"a {name} tile",)) for name in names]
    measured = evaluate(clip, pairs, classes, batch_size=32, several_labels=True)
    assert measured.metrics["zero_shot/average_precision"] == pytest.approx(
        benchmark_average_precision(logits, target), abs=1e-6
    )
    assert not {"zero_shot/accuracy", "zero_shot/balanced_accuracy"} & measured.metrics.keys()
    assert measured.confusion == ()
    assert [entry.samples for entry in measured.classes] == [12, 12, 4]
    assert all(math.isnan(entry.recall) for entry in measured.classes)


@torch.no_grad()
def test_zero_shot_retrieval_equals_clip_benchmark(clip: Clip, tiles: Path) -> None:
    # As in its data: every image has captions of its own, five here.
    pairs = Pairs(
        [
            Pair(
                row=row,
                image=tiles / f"{row // 5}.png",
                reference="",
                caption=f"number {row}, a {COLOURS[row // 5 % 3]} tile",
            )
            for row in range(100)
        ]
    )
    images = images_of(clip, [tiles / f"{row}.png" for row in range(20)])
    texts = F.normalize(clip.encode_texts(clip.tokenize([pair.caption for pair in pairs.pairs])), dim=-1)
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(100), torch.arange(100) // 5] = True
    metrics = evaluate(clip, pairs, (), batch_size=32).metrics
    for k in (1, 5, 10):
        image_retrieval = benchmark_recall(scores, positive, k)
        text_retrieval = benchmark_recall(scores.T, positive.T, k)
        assert metrics[f"retrieval/text_to_image_recall@{k}"] == pytest.approx(image_retrieval)
        assert metrics[f"retrieval/image_to_text_recall@{k}"] == pytest.approx(text_retrieval)


@pytest.mark.parametrize("similarity", ["cosine", "squared_euclidean", "angular", "lorentz"])
def test_metrics_do_not_depend_on_the_batch_size(tiles: Path, similarity: str) -> None:
    clip = build(ModelSource(name="cliptune-test-vit", similarity=similarity), seed=1)
    measured = [
        evaluate(clip, rows(tiles), CLASSES, batch_size=size, bootstrap_samples=20) for size in (1, 7, 64)
    ]
    errors = [each.metrics.pop("zero_shot/calibration_error") for each in measured]
    assert errors == pytest.approx([errors[0]] * 3, abs=1e-4)  # goes by the values, not by their order
    assert measured[0] == measured[1] == measured[2]
    assert measured[0].samples == 20
    assert measured[0].intervals.keys() == measured[0].metrics.keys()
    assert measured[0].metrics.keys() == {*MAIN_METRICS} - {"zero_shot/accuracy@5"}


def test_the_table_of_classes_and_the_confusion_tell_the_same_answers(clip: Clip, tiles: Path) -> None:
    measured = evaluate(clip, rows(tiles), CLASSES, batch_size=16, main_metric="zero_shot/auroc")
    confusion = np.array(measured.confusion)
    assert [entry.label for entry in measured.classes] == list(COLOURS)
    assert [entry.samples for entry in measured.classes] == confusion.sum(axis=1).tolist() == [7, 7, 6]
    assert measured.metrics["zero_shot/accuracy"] == pytest.approx(np.trace(confusion) / 20)
    for place, entry in enumerate(measured.classes):
        assert entry.recall == pytest.approx(confusion[place, place] / confusion[place].sum())
        taken = confusion[:, place].sum()
        assert entry.precision == pytest.approx(confusion[place, place] / max(taken, 1))
    areas = [entry.auroc for entry in measured.classes]
    assert measured.metrics["zero_shot/auroc"] == pytest.approx(np.mean(areas))
    assert measured.main_metric == "zero_shot/auroc"


@torch.no_grad()
def test_a_class_with_negative_prompts_is_judged_by_itself(clip: Clip, tiles: Path) -> None:
    pairs = several(tiles)
    (alone,) = [ClassConfig(label="red", prompts=("a red tile",), negative_prompts=("a tile", "no red"))]
    measured = evaluate(clip, pairs, [alone], batch_size=16, several_labels=True)
    images = images_of(clip, [tiles / f"{row}.png" for row in range(24)])
    texts = F.normalize(clip.encode_texts(clip.tokenize(["a red tile", "a tile", "no red"])), dim=-1)
    against = F.normalize(texts[1:].mean(dim=0), dim=-1)
    both = clip.logit_scale * images @ torch.stack([texts[0], against]).T
    probability = both.softmax(dim=1)[:, 0]
    red = torch.tensor(["red" in pair.labels for pair in pairs.pairs])
    (entry,) = measured.classes
    likelier = probability > 0.5
    assert entry.recall == pytest.approx(float(likelier[red].float().mean()))
    order = torch.argsort(probability)
    ranks = torch.empty(24)
    ranks[order] = torch.arange(1.0, 25.0)
    area = float(ranks[red].sum() - 12 * 13 / 2) / (12 * 12)
    assert entry.auroc == pytest.approx(area)
    assert 0.0 <= measured.metrics["zero_shot/calibration_error"] <= 1.0


def test_an_image_without_a_known_label_is_left_out_only_where_classes_exclude_each_other(
    tiles: Path,
) -> None:
    pairs = several(tiles)
    alternatives = Pairs([replace(pair, labels=pair.labels[:1]) for pair in pairs.pairs])
    assert len(Truth.of(alternatives, CLASSES, several_labels=False)) == 16
    assert Truth.of(alternatives, CLASSES, several_labels=False).one_each
    assert len(Truth.of(pairs, CLASSES, several_labels=False)) == 8  # those of two labels are left out, too
    assert len(Truth.of(pairs, CLASSES, several_labels=True)) == 24
    assert not Truth.of(pairs, CLASSES, several_labels=True).one_each


@pytest.mark.parametrize("several_labels", [True, False])
def test_rows_of_one_image_bring_their_labels_together_or_contradict_each_other(
    tiles: Path, several_labels: bool
) -> None:
    found = (("0", "red"), ("0", "red"), ("0", "blue"), ("1", "red"))
    pairs = Pairs(
        [
            Pair(row=row, image=tiles / f"{name}.png", reference="", caption=f"row {row}", labels=(label,))
            for row, (name, label) in enumerate(found)
        ]
    )
    truth = Truth.of(pairs, CLASSES, several_labels=several_labels)
    if several_labels:
        assert truth.truth_SC.tolist() == [[True, False, True], [True, False, False]]
        assert (truth.alternatives, truth.contradicted) == (False, ())
    else:
        assert truth.truth_SC.tolist() == [[True, False, False]]
        assert (truth.alternatives, truth.contradicted) == (True, (0, 1, 2))


def test_retrieval_counts_every_image_that_carries_the_caption(clip: Clip, tiles: Path) -> None:
    # One caption for all: whichever image comes first is a positive.
    alike = Pairs(
        [Pair(row=row, image=tiles / f"{row}.png", reference="", caption="a tile") for row in range(6)]
    )
    metrics = evaluate(clip, alike, (), batch_size=4).metrics
    assert set(metrics.values()) == {1.0}
    assert not any(name.startswith("zero_shot/") for name in metrics)


def test_an_image_that_is_gone_is_left_out_of_the_evaluation(clip: Clip, tiles: Path) -> None:
    gone = Pair(row=99, image=tiles / "gone.png", reference="", caption="a red tile", labels=("red",))
    measured = evaluate(clip, Pairs([*rows(tiles).pairs, gone]), CLASSES, batch_size=16)
    assert (measured.samples, measured.unreadable) == (20, 1)
    assert all(0.0 <= value <= 1.0 for value in measured.metrics.values())


def test_an_evaluation_without_a_readable_image_tells_nothing(clip: Clip, tiles: Path) -> None:
    gone = Pair(row=1, image=tiles / "gone.png", reference="", caption="a red tile", labels=("red",))
    measured = evaluate(clip, Pairs([gone]), CLASSES, batch_size=4, main_metric="zero_shot/auroc")
    assert (measured.metrics, measured.main_metric, measured.unreadable) == ({}, "", 1)


def test_an_evaluation_gives_way_when_asked(clip: Clip, tiles: Path) -> None:
    with pytest.raises(EvaluationInterrupted):
        evaluate(clip, rows(tiles), CLASSES, batch_size=4, interrupted=lambda: True)
    assert not clip.model.training


def means(values: Booleans | Floats, weights: Floats) -> dict[str, Floats]:
    return {"mean": share(values, weights)}


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    random = np.random.default_rng(4)
    values = random.random(400) < 0.3
    found = intervals(
        lambda weights: means(values, weights), np.arange(400), resamples=4000, check=lambda: None
    )["mean"]
    error = math.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (found.low + found.high) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


def test_an_interval_over_groups_is_that_of_their_means_alone() -> None:
    # Twenty rows of one group say no more than one: 10 patients, each all right or all wrong.
    right = np.repeat(np.arange(10) % 2 == 0, 20)
    patients = np.repeat(np.arange(10), 20)
    of_groups, of_one_each, of_rows = (
        intervals(
            lambda weights, kept=kept: means(right[kept], weights),
            units,
            resamples=1000,
            check=lambda: None,
        )["mean"]
        for kept, units in (
            (slice(None), patients),
            (slice(None, None, 20), np.arange(10)),
            (slice(None), np.arange(200)),
        )
    )
    assert of_groups == of_one_each
    assert of_groups.high - of_groups.low > 3 * (of_rows.high - of_rows.low)


def test_one_unit_and_a_metric_that_resamples_cannot_tell_have_no_interval() -> None:
    def unknown(weights: Floats) -> dict[str, Floats]:
        return {"unknown": np.full(len(weights), np.nan)}

    assert intervals(unknown, np.arange(5), resamples=10, check=lambda: None) == {}
    one = intervals(
        lambda weights: means(np.ones(4), weights),
        np.zeros(4, dtype=np.int64),
        resamples=9,
        check=lambda: None,
    )
    assert one == {}


def test_a_caption_of_several_groups_is_drawn_by_itself(tiles: Path) -> None:
    pairs = [
        Pair(row=0, image=tiles / "0.png", reference="", caption="shared", group="a"),
        Pair(row=1, image=tiles / "1.png", reference="", caption="own", group="a"),
        Pair(row=2, image=tiles / "2.png", reference="", caption="shared", group="b"),
        Pair(row=3, image=tiles / "3.png", reference="", caption="alone"),
    ]
    units = Units.of(Pairs(pairs))
    images, captions = units.images_I.tolist(), units.captions_T.tolist()
    assert images[0] == images[1] == captions[1]
    assert len({images[0], images[2], images[3], captions[0]}) == 4
    assert captions[2] == images[3]


def test_intervals_hold_the_values_and_do_not_change_from_run_to_run(clip: Clip, tiles: Path) -> None:
    first, second = (
        evaluate(clip, rows(tiles), CLASSES, batch_size=16, bootstrap_samples=200) for _ in range(2)
    )
    assert first.intervals == second.intervals
    for name, interval in first.intervals.items():
        assert isinstance(interval, Interval)
        assert interval.low <= first.metrics[name] <= interval.high, name
