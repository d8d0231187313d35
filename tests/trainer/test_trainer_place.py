from __future__ import annotations

from dataclasses import replace

from cliptune_model.source import ModelSource
from cliptune_trainer.spec import CheckpointConfig, DataConfig, EvaluationConfig, Spec
from cliptune_trainer.training.checkpoint import TrainingState
from cliptune_trainer.training.place import Place

SPEC = Spec(
    name="place",
    model=ModelSource(name="cliptune-test-vit"),
    data=DataConfig(train="none.csv"),
    evaluation=EvaluationConfig(every_epochs=2),
    checkpoint=CheckpointConfig(every_steps=3),
)


def place(spec: Spec = SPEC, *, state: TrainingState | None = None, measurable: bool = True) -> Place:
    """In a run of six epochs of two steps each."""
    return Place(spec, total_steps=12, steps_per_epoch=2, measurable=measurable, state=state)


def walked(one: Place) -> list[tuple[int, str]]:
    """To the end: what was due, and done, at which step."""
    found = []
    while True:
        assert one.standstill_due() is (one.at_end or bool(one.evaluation_due()) or one.checkpoint_due())
        if occasion := one.evaluation_due():
            found.append((one.step, occasion))
            one.evaluation_done()
        if one.checkpoint_due():
            found.append((one.step, "checkpoint"))
            one.save_done()
        if one.at_end:
            return found
        if one.epoch_begins:
            found.append((one.step, f"epoch {one.epoch}"))
        one.step += 1


def test_epochs_evaluations_and_checkpoints_come_in_their_order_each_once() -> None:
    epochs = [(step, f"epoch {step // 2}") for step in range(0, 12, 2)]
    evaluations = [(0, "before"), (4, "during"), (8, "during"), (12, "after")]
    saved = [(step, "checkpoint") for step in (3, 6, 9, 12)]
    found = walked(place())
    assert sorted(found) == sorted(epochs + evaluations + saved)
    assert [step for step, _ in found] == sorted(step for step, _ in found)


def test_an_attempt_goes_on_with_what_the_checkpoint_had_not_done_and_an_epoch_of_its_own() -> None:
    state = TrainingState(step=9, counters={"evaluated_step": 8}, tensors={})
    one = place(state=state)
    assert one.saved
    assert one.state() == {"evaluated_step": 8}
    assert walked(one) == [(9, "epoch 4"), (10, "epoch 5"), (12, "after"), (12, "checkpoint")]


def test_a_checkpoint_in_the_middle_of_an_epoch_does_not_begin_another() -> None:
    one = place()
    one.step = 3
    one.save_done()
    assert one.saved
    assert not one.epoch_begins


def test_without_rows_to_measure_or_a_model_to_publish_the_end_is_only_an_end() -> None:
    kept = walked(place(replace(SPEC, publishes=False), measurable=False))
    assert [entry for entry in kept if entry[0] == 12] == []
    assert {what for _, what in kept if not what.startswith("epoch")} == {"checkpoint"}
