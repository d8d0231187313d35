"""An evaluation as it is printed."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path

from cliptune import ClassResult, Evaluation, Interval
from cliptune.evaluation import evaluation_from_message
from cliptune.evaluation_lines import class_rows, evaluation_lines, interval_rows
from cliptune.metric_names import CALIBRATION_ERROR, MAIN_METRICS
from cliptune.spec import spec_from_mapping
from cliptune.spec_shape import validate_shape
from cliptune.v1 import job_pb2

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"


def told() -> job_pb2.Evaluation:
    classes = [
        job_pb2.ClassResult(
            label="crack", samples=7, precision=0.5, recall=1.0, auroc=0.75, average_precision=0.8
        ),
        job_pb2.ClassResult(
            label="unseen", precision=math.nan, recall=math.nan, auroc=math.nan, average_precision=math.nan
        ),
    ]
    return job_pb2.Evaluation(
        step=12,
        occasion="after",
        samples=9,
        metrics={
            "retrieval/image_to_text_recall@10": 1.0,
            "retrieval/image_to_text_recall@5": 0.5,
            "zero_shot/auroc": 0.75,
        },
        intervals={"zero_shot/auroc": job_pb2.Interval(low=0.7, high=0.8)},
        classes=classes,
        confusion=[7, 0, 1, 1],
        main_metric="zero_shot/auroc",
        pictures=["pictures/confusion-00000012.png"],
    )


def test_an_evaluation_keeps_what_its_message_says() -> None:
    evaluation = evaluation_from_message(told())
    assert evaluation.main == 0.75
    assert evaluation.intervals == {"zero_shot/auroc": Interval(low=0.7, high=0.8)}
    assert evaluation.confusion == ((7, 0), (1, 1))
    assert evaluation.classes[0] == ClassResult(
        label="crack", samples=7, precision=0.5, recall=1.0, auroc=0.75, average_precision=0.8
    )
    assert evaluation.pictures == ("pictures/confusion-00000012.png",)


def test_an_evaluation_of_an_older_daemon_has_metrics_alone() -> None:
    evaluation = evaluation_from_message(job_pb2.Evaluation(metrics={"zero_shot/accuracy": 0.5}))
    assert math.isnan(evaluation.main)
    assert (evaluation.classes, evaluation.confusion, evaluation.intervals) == ((), (), {})


def test_the_main_metric_stands_first_with_a_star_and_its_interval() -> None:
    assert interval_rows(evaluation_from_message(told())) == [
        ("zero_shot/auroc *", "0.7500", "0.7000 to 0.8000"),
        ("retrieval/image_to_text_recall@5", "0.5000", ""),
        ("retrieval/image_to_text_recall@10", "1.0000", ""),
    ]


def test_a_class_that_cannot_be_judged_has_dashes() -> None:
    assert class_rows(evaluation_from_message(told()))[1] == ("unseen", "0", "-", "-", "-", "-")


def test_classes_and_pictures_are_lines_of_the_last_evaluation_alone() -> None:
    message = told()
    metrics, head, crack, unseen, picture = evaluation_lines(evaluation_from_message(message))
    assert metrics.startswith("evaluation (after) at step 12: zero_shot/auroc 0.7500 (0.7000 to 0.8000)  ")
    assert head.split()[:3] == ["CLASS", "IMAGES", "PRECISION"]
    assert crack.split() == ["crack", "7", "0.5000", "1.0000", "0.7500", "0.8000"]
    assert len({len(head), len(crack), len(unseen)}) == 1
    assert picture.strip() == "pictures/confusion-00000012.png"
    message.occasion = "during"
    assert len(evaluation_lines(evaluation_from_message(message))) == 1


def test_very_many_classes_are_no_lines_of_an_event() -> None:
    message = told()
    del message.classes[:], message.confusion[:]
    message.classes.extend(job_pb2.ClassResult(label=str(place)) for place in range(31))
    lines = evaluation_lines(evaluation_from_message(message))
    assert len(lines) == 2
    assert isinstance(evaluation_from_message(message), Evaluation)


def test_every_main_metric_has_a_name_of_its_own() -> None:
    assert len(set(MAIN_METRICS)) == len(MAIN_METRICS) == 13


def test_the_parts_of_specs_in_the_documentation_are_specs() -> None:
    parts = re.findall(r"```toml\n(.+?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(parts) == 2
    for part in parts:
        needed = {"name": "a", "model": {"name": "ViT-B-32"}, "data": {"train": "rows.csv"}}
        validate_shape(spec_from_mapping({**needed, **tomllib.loads(part)}))


def test_the_documentation_names_every_metric() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    named = re.sub(r"@\d+$", "@k", "\n".join((*MAIN_METRICS, CALIBRATION_ERROR)), flags=re.MULTILINE)
    for name in named.replace("accuracy@k", "accuracy@5").split():
        shown = "`retrieval/…_map`" if name.endswith("_map") else f"`{name}`"
        assert shown in text, name
