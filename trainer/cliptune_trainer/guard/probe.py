"""A user's general images as a probe: what the model still knows of them.

Enters: the spec's `[guard.probe]`. Leaves: a `General` of any model. Read by preparation, which refuses a
probe that measures nothing before the job waits for a device, and by `guard`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from cliptune.errors import CliptuneError, DataError
from cliptune.metric_names import BALANCED_ACCURACY, DIRECTIONS, MAIN_METRICS, recall_name
from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.findings import examine
from cliptune_trainer.data.forms.reader import read_table
from cliptune_trainer.data.roots import DataRoots
from cliptune_trainer.data.table import Pair
from cliptune_trainer.evaluation.measure import evaluate
from cliptune_trainer.evaluation.truth import Truth
from cliptune_trainer.guard.general import General
from cliptune_trainer.spec import ClassConfig, EvaluationConfig, wrong
from cliptune_trainer.spec.guard import ProbeConfig

_RETRIEVAL: Final = recall_name(DIRECTIONS[0], 1)
_FIELD: Final = "guard.probe.data"


class PairsProbe:
    """Measures general pairs as an evaluation measures the domain's.

    Args:
        pairs: the sample.
        classes: to tell apart; none: texts are retrieved only.
        main_metric: the one that counts.
        batch_size: images or texts in one forward pass.
        check: called between forward passes; may raise.
    """

    def __init__(
        self,
        pairs: Pairs,
        classes: Sequence[ClassConfig],
        main_metric: str,
        *,
        batch_size: int,
        check: Callable[[], None],
    ) -> None:
        self._pairs, self._classes, self._main_metric = pairs, classes, main_metric
        self._batch_size, self._check = batch_size, check

    def remember(self, clip: Clip) -> General:
        """The starting model's metrics are what losses are counted from."""
        return self.measure(clip, resamples=0)

    def measure(self, clip: Clip, *, resamples: int) -> General:
        """Metrics of any model, and the interval of the one that counts.

        Raises:
            DataError: its images can no longer be read.
        """

        def interrupted() -> bool:
            self._check()
            return False

        measured = evaluate(
            clip,
            self._pairs,
            self._classes,
            batch_size=self._batch_size,
            main_metric=self._main_metric,
            bootstrap_samples=resamples,
            interrupted=interrupted,
        )
        if not measured.main_metric:
            raise DataError(
                f"{_FIELD}: {self._main_metric} can no longer be measured, {measured.unreadable} images"
                " cannot be read any more",
                path=_FIELD,
            )
        return General(
            metrics=measured.metrics,
            main_metric=measured.main_metric,
            samples=measured.samples,
            interval=measured.intervals.get(measured.main_metric),
        )


def read_probe(
    config: ProbeConfig,
    roots: DataRoots,
    evaluation: EvaluationConfig,
    *,
    examined: bool,
    check: Callable[[], None] = lambda: None,
    cache: Path | None = None,
) -> PairsProbe:
    """Reads a sample of the rows.

    Args:
        config: what the spec says of it.
        roots: folders that may be read.
        evaluation: templates that labels are put into, and the batch size.
        examined: preparation has opened the sample's images already.
        check: called between forward passes; may raise.
        cache: folder where an index of shards is kept.

    Raises:
        DataError: it has no rows or images that can be used, or only one image or text.
        SpecError: the metric asked for cannot be told from it.
        MissingColumnError, PathOutsideRootsError: see `read_table`.
    """
    try:
        table = read_table(config.data, config.table(), roots, cache=cache)
    except CliptuneError as error:
        raise type(error)(f"{_FIELD}: {error.message}", **error.metadata) from error
    sample = sampled(table.pairs, config.max_images)
    if not examined:
        unreadable = examine([replace(table, pairs=sample)], config.table().reading).unreadable[
            str(table.path)
        ]
        if sample and len(unreadable) == len({pair.row for pair in sample}):
            raise DataError(
                f"{_FIELD}: none of its images can be read; the first: {next(iter(unreadable.values()))}",
                path=_FIELD,
            )
        sample = tuple(pair for pair in sample if pair.row not in unreadable)
    pairs = Pairs(sample)
    images, texts = len(set(pairs.image_ids.tolist())), len(set(pairs.caption_ids.tolist()))
    labels = pairs.labels if len(pairs.labels) > 1 else ()
    if images < 2 or (texts < 2 and not labels):
        raise DataError(
            f"{_FIELD}: {config.data} has {images} images with {texts} different texts that can be used: a"
            " probe needs two of each, or labels; without [guard.probe] the starting model is the measure",
            path=_FIELD,
        )
    # A label says in general data what it says in its own templates: names of the domain's labels are none's.
    prompts = EvaluationConfig(prompt_templates=evaluation.prompt_templates)
    classes = tuple(ClassConfig(label=label, prompts=prompts.prompts_of(label)) for label in labels)
    return PairsProbe(
        pairs,
        classes,
        _main_metric(config.main_metric, pairs, classes),
        batch_size=evaluation.batch_size,
        check=check,
    )


def sampled(pairs: Sequence[Pair], most: int) -> tuple[Pair, ...]:
    """The pairs of at most so many images: the same ones each time, whatever the rows' order."""
    names = sorted(
        {pair.reference for pair in pairs}, key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    kept = set(names[:most])
    return tuple(pair for pair in pairs if pair.reference in kept)


def _main_metric(wanted: str, pairs: Pairs, classes: Sequence[ClassConfig]) -> str:
    measurable = Truth.of(pairs, classes, several_labels=False).measurable() if classes else frozenset()
    possible = [name for name in MAIN_METRICS if name in measurable or name.startswith("retrieval/")]
    if wanted and wanted not in possible:
        raise wrong(
            "guard.probe.main_metric", f"{wanted!r}, which the probe's rows do not tell", ", ".join(possible)
        )
    return wanted or (BALANCED_ACCURACY if BALANCED_ACCURACY in measurable else _RETRIEVAL)
