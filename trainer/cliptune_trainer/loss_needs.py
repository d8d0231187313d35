"""Whether the data and the model have what the losses of a job need.

Enters: a spec, the training rows, the model. Leaves: remarks for the user, or an error. Called by `decide`.
"""

from __future__ import annotations

from cliptune_model.clip import Clip
from cliptune_trainer.data.dataset import Pairs
from cliptune_trainer.data.hard_captions import HARD_CAPTION_NEEDS, HardCaptions
from cliptune_trainer.losses.entry import LABELS, NEGATIVE_CAPTIONS, TEACHER
from cliptune_trainer.remark import Remark
from cliptune_trainer.spec import Spec, wrong


def check_loss(spec: Spec, rows: Pairs, clip: Clip) -> list[Remark]:
    """What there is to mind.

    Raises:
        SpecError: no row has a label, or no caption can be made wrong, where the losses need them; Matryoshka
            dimensions beyond the embedding's.
    """
    spec.loss.check_dimensions(clip.embedding_dim)
    needs, told = spec.loss.needs, f"loss {' + '.join(spec.loss.names)}"
    remarks = []
    if LABELS in needs:
        labelled = sum(bool(pair.labels) for pair in rows.pairs)
        if not labelled:
            found = repr(spec.data.label_column) if spec.data.label_column else "empty"
            allowed = "a column with the images' labels"
            raise wrong("data.label_column", f"{found}, but {told} goes by labels", allowed)
        if missing := len(rows) - labelled:
            remarks.append(
                Remark(
                    code="rows-without-label",
                    message=f"{missing} of {len(rows)} training rows have no label: {told} takes each for"
                    " alike to nothing but its own image and caption",
                )
            )
    if NEGATIVE_CAPTIONS in needs:
        hard = HardCaptions.of(rows, spec.train.seed)
        possible = sum(hard.possible(pair.caption) for pair in rows.pairs)
        if not possible:
            raise wrong("loss.name", f"{told}, but no caption can be made wrong", HARD_CAPTION_NEEDS)
        if missing := len(rows) - possible:
            remarks.append(
                Remark(
                    code="captions-without-negative",
                    message=f"{missing} of {len(rows)} captions cannot be made wrong by changing their words:"
                    f" {told} leaves these rows without one",
                    warning=False,
                )
            )
    if TEACHER in needs and not clip.pretrained:
        remarks.append(
            Remark(
                code="teacher-untrained",
                message=f"{told} keeps the model to what it is at the start, and that is random weights",
            )
        )
    return remarks
