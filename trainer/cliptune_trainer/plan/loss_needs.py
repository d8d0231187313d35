"""Whether the data and the model have what the losses of a job need.

Enters: a spec, the training rows, the model. Leaves: remarks for the user, or an error. Called by `decide`.
"""

from __future__ import annotations

from collections.abc import Iterator

from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.hard_captions import HARD_CAPTION_NEEDS, HardCaptions
from cliptune_trainer.losses.entry import LABELS, NEGATIVE_CAPTIONS, TEACHER
from cliptune_trainer.remark import Remark
from cliptune_trainer.spec import Spec, wrong


def check_loss(spec: Spec, rows: Pairs, clip: Clip, *, batch_size: int) -> list[Remark]:
    """What there is to mind.

    Raises:
        SpecError: no row has a label, or no caption can be made wrong, where the losses need them; Matryoshka
            dimensions beyond the embedding's.
    """
    spec.loss.check_dimensions(clip.embedding_dim)
    needs, told = spec.loss.needs, f"loss {' + '.join(spec.loss.names)}"
    remarks = [*_repeats(spec, rows, batch_size)]
    if LABELS in needs:
        remarks += _labels(spec, rows, told)
    if NEGATIVE_CAPTIONS in needs:
        remarks += _wrong_captions(spec, rows, told)
    if TEACHER in needs and not clip.pretrained:
        message = f"{told} keeps the model to what it is at the start, and that is random weights"
        remarks.append(Remark(code="teacher-untrained", message=message))
    return remarks


def _repeats(spec: Spec, rows: Pairs, batch_size: int) -> Iterator[Remark]:
    terms = [term.name for term in spec.loss.terms if term.entry(spec.loss.temperature).parts_repeats]
    captions = len(set(rows.caption_ids.tolist()))
    if terms and captions < batch_size:
        message = (
            f"{captions} distinct captions in batches of {batch_size}: {' and '.join(terms)} takes rows with"
            " the same caption for negatives of each other; loss.name = 'multi_positive' does not"
        )
        yield Remark(code="repeated-captions", message=message, warning=False)


def _labels(spec: Spec, rows: Pairs, told: str) -> Iterator[Remark]:
    labelled = sum(bool(pair.labels) for pair in rows.pairs)
    if not labelled:
        found = repr(spec.data.label_column) if spec.data.label_column else "empty"
        allowed = "a column with the images' labels"
        raise wrong("data.label_column", f"{found}, but {told} goes by labels", allowed)
    if missing := len(rows) - labelled:
        message = (
            f"{missing} of {len(rows)} training rows have no label: {told} takes each for alike to nothing"
            " but its own image and caption"
        )
        yield Remark(code="rows-without-label", message=message)


def _wrong_captions(spec: Spec, rows: Pairs, told: str) -> Iterator[Remark]:
    hard = HardCaptions.of(rows, spec.train.seed)
    possible = sum(hard.possible(pair.caption) for pair in rows.pairs)
    if not possible:
        raise wrong("loss.name", f"{told}, but no caption can be made wrong", HARD_CAPTION_NEEDS)
    if missing := len(rows) - possible:
        message = (
            f"{missing} of {len(rows)} captions cannot be made wrong by changing their words: {told} leaves"
            " these rows without one"
        )
        yield Remark(code="captions-without-negative", message=message, warning=False)
