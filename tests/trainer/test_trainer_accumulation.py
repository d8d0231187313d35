from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cliptune_model.clip import Clip
from cliptune_trainer.data.loading.loader import Batch
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.steps.accumulation import accumulate, loss_of_features
from cliptune_trainer.steps.batch_norm import FROZEN, PASSING, WHOLE, BatchNorms, choose_batch_norm
from cliptune_trainer.steps.parts import parts_of
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.replay import RandomState
from cliptune_trainer.steps.teacher import StartingModel
from tests.trainer.towers import distance, gradients, small_batch, small_clip

FP32 = Precision("fp32", "cpu")
ROWS = 7


def whole(
    clip: Clip,
    objective: Objective,
    batch: Batch,
    parts: int = ROWS,
    teacher: StartingModel | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient in one pass: all graphs held, one backward pass. No code of the accumulation.

    The towers see `parts` pairs at a time, in the order in which accumulation takes them, so that random
    layers draw the same masks.
    """
    starts = range(0, len(batch.tokens_BL), parts)
    towers: tuple[tuple[Callable[[Tensor], Tensor], Tensor], ...] = (
        (clip.encode_images, batch.images_B3HW),
        (clip.encode_texts, batch.tokens_BL),
    )
    early = [[encode(data[start : start + parts]) for start in starts[:-1]] for encode, data in towers]
    last = [encode(data[starts[-1] :]) for encode, data in towers]
    image_BD, text_BD = (torch.cat([*some, end]) for some, end in zip(early, last, strict=True))
    if batch.negative_tokens_BL is not None:
        text_BD = torch.cat([text_BD, clip.encode_texts(batch.negative_tokens_BL)])
    taught = teacher(batch, ROWS, FP32) if teacher else None
    value = loss_of_features(clip, objective, batch, image_BD, text_BD, taught)
    value.backward()  # type: ignore[no-untyped-call]
    return float(value.detach()), all_gradients(clip, objective)


def accumulated(
    clip: Clip,
    objective: Objective,
    batch: Batch,
    size: int,
    texts: int = 1,
    teacher: StartingModel | None = None,
) -> tuple[float, dict[str, Tensor]]:
    value = accumulate(clip, objective, FP32, batch, size, texts_per_image=texts, teacher=teacher)
    return float(value), all_gradients(clip, objective)


def all_gradients(clip: Clip, objective: Objective) -> dict[str, Tensor]:
    """Those of the model, and of what the objective learns itself; taken out of both."""
    own = {
        f"loss.{name}": value.grad for name, value in objective.named_parameters() if value.grad is not None
    }
    objective.zero_grad(set_to_none=True)
    return gradients(clip) | own


COMPOSED = LossConfig(
    terms=(Term(name="infonce"), Term(name="hard_caption", weight=0.5), Term(name="margin", weight=2.0)),
    weighting="uncertainty",
    matryoshka_dims=(8, 16),
)
CONFIGS = {
    **{name: LossConfig(terms=(Term(name=name),)) for name in LOSSES},
    "robust": LossConfig(temperature="global"),
    "composed": COMPOSED,
}
WAYS = [(name, None) for name in CONFIGS] + [(name, 4) for name, entry in LOSSES.items() if entry.tiled]


@pytest.mark.parametrize(("name", "block"), WAYS, ids=[f"{name}-{block or 'whole'}" for name, block in WAYS])
def test_every_loss_has_the_gradient_of_the_whole_batch_in_fp64_and_fp32(
    name: str, block: int | None
) -> None:
    objective = Objective(CONFIGS[name], block=block)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        clip, start = small_clip("siglip"), small_clip("siglip", seed=3)
        clip.model.to(dtype)
        start.model.to(dtype)
        teacher = StartingModel(start)
        batch = small_batch(ROWS, dtype=dtype, full=True)
        value, wanted = whole(clip, objective, batch, teacher=teacher)
        assert ("logit_scale" in wanted) == (name != "margin")
        assert ("logit_bias" in wanted) == (name == "sigmoid")
        assert ("loss.log_variances" in wanted) == (name == "composed")
        for size, texts in ((1, 1), (3, 2), (100, 1)):
            other, found = accumulated(clip, objective, batch, size, texts, teacher)
            assert other == pytest.approx(value, rel=tolerance)
            assert distance(found, wanted) <= tolerance, f"micro-batch {size} in {dtype}"


@pytest.mark.parametrize("kind", ["vit", "convnext", "coca"])
def test_every_tower_has_the_gradient_of_the_whole_batch(kind: str) -> None:
    clip, batch = small_clip(kind), small_batch(ROWS)
    value, wanted = whole(clip, Objective(), batch)
    other, found = accumulated(clip, Objective(), batch, 3)
    assert other == pytest.approx(value, rel=1e-5)
    assert distance(found, wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["dropout", "patch-dropout"])
def test_random_layers_draw_the_masks_of_the_first_pass_again(kind: str) -> None:
    clip, batch = small_clip(kind), small_batch(6)
    for size in (2, 3):
        torch.manual_seed(5)
        value, wanted = whole(clip, Objective(), batch, parts=size)
        after = torch.randn(())
        torch.manual_seed(5)
        other, found = accumulated(clip, Objective(), batch, size)
        assert other == pytest.approx(value, rel=1e-5)
        assert distance(found, wanted) <= 1e-5
        assert torch.randn(()) == after, "the generator goes on where one pass would have left it"
    torch.manual_seed(6)
    assert distance(accumulated(clip, Objective(), batch, 3)[1], wanted) > 0.05, "no mask was drawn at all"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_the_accumulated_gradient_is_as_near_as_the_formats_rounding(precision: str) -> None:
    clip, batch = small_clip("vit"), small_batch(8)
    settings = Precision(precision, "cpu")
    accumulate(clip, Objective(), settings, batch, 8)
    wanted = gradients(clip)
    value = accumulate(clip, Objective(), settings, batch, 3)
    found = gradients(clip)
    assert value.dtype == torch.float32
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    exact = whole(clip, Objective(), batch)[1]
    if settings.scaler is not None:
        scale = float(settings.scaler.scale)
        assert scale == 65536
        wanted, found = ({name: value / scale for name, value in some.items()} for some in (wanted, found))
    # Half precision alone is this far from fp32; accumulation adds nothing to it.
    assert distance(found, wanted) <= distance(wanted, exact)
    assert distance(found, exact) <= 1.5 * distance(wanted, exact)


def count_passes(clip: Clip) -> dict[str, int]:
    passes = {"image": 0, "text": 0}

    def count(tower: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: object) -> None:
            passes[tower] += 1

        return hook

    visual, text = clip.model.visual, clip.model.ln_final
    assert isinstance(visual, nn.Module)
    assert isinstance(text, nn.Module)
    visual.register_forward_hook(count("image"))
    text.register_forward_hook(count("text"))
    return passes


def test_a_batch_of_one_part_passes_once_and_k_parts_pass_2k_minus_1_times() -> None:
    clip, batch = small_clip("vit"), small_batch(8)
    passes = count_passes(clip)
    accumulated(clip, Objective(), batch, 8)
    assert passes == {"image": 1, "text": 1}
    accumulated(clip, Objective(), batch, 2, texts=2)
    assert passes == {"image": 1 + 7, "text": 1 + 3}


def test_a_frozen_tower_is_not_replayed() -> None:
    clip, batch = small_clip("vit"), small_batch(8)
    visual = clip.model.visual
    assert isinstance(visual, nn.Module)
    visual.requires_grad_(False)
    wanted = whole(clip, Objective(), batch)[1]
    passes = count_passes(clip)
    found = accumulated(clip, Objective(), batch, 2)[1]
    assert passes == {"image": 4, "text": 7}
    assert distance(found, wanted) <= 1e-5
    assert not any(name.startswith("visual") for name in found)


def test_parts_are_few_even_and_of_two_lengths_at_most() -> None:
    for count, size, lengths in ((8, 4, [4, 4]), (7, 3, [2, 2, 3]), (1, 5, [1]), (10, 4, [3, 3, 4])):
        parts = parts_of(count, size)
        assert [part.stop - part.start for part in parts] == lengths
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
    with pytest.raises(ValueError, match="micro-batch of 0"):
        parts_of(4, 0)


def test_generators_are_put_back_and_a_replay_leaves_no_trace() -> None:
    state = RandomState.capture(torch.device("cpu"))
    first = torch.randn(3)
    second = torch.randn(3)
    state.restore()
    assert torch.equal(torch.randn(3), first)
    with state.replayed():
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.randn(3), second)


@pytest.mark.parametrize("kind", ["resnet", "timm-resnet"])
def test_running_statistics_count_each_part_once(kind: str) -> None:
    clip, batch = small_clip(kind), small_batch(6)
    buffers = {name: value.clone() for name, value in clip.model.named_buffers()}
    with torch.no_grad():  # what three parts leave behind that pass once
        for start in (0, 2, 4):
            clip.encode_images(batch.images_B3HW[start : start + 2])
    wanted = {name: value.clone() for name, value in clip.model.named_buffers()}
    clip.model.load_state_dict(buffers, strict=False)
    accumulated(clip, Objective(), batch, 2)
    for name, value in clip.model.named_buffers():
        assert torch.allclose(value, wanted[name], atol=1e-6), name
    assert (
        int(
            wanted[
                "visual.bn1.num_batches_tracked"
                if kind == "resnet"
                else "visual.trunk.bn1.num_batches_tracked"
            ]
        )
        == 3
    )


def test_frozen_statistics_make_a_convolutional_tower_exact() -> None:
    clip, batch = small_clip("resnet"), small_batch(ROWS)
    accumulated(clip, Objective(), batch, ROWS)  # statistics that are not those of random weights
    before = {name: value.clone() for name, value in clip.model.named_buffers()}
    norms = BatchNorms(clip.model, frozen=True)
    clip.model.train()
    norms.prepare()
    wanted = whole(clip, Objective(), batch)[1]
    accumulate(clip, Objective(), FP32, batch, 3, batch_norms=norms)
    assert distance(gradients(clip), wanted) <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in clip.model.named_buffers())


def test_what_batch_normalisation_does_is_chosen_with_its_reason() -> None:
    vit, resnet = small_clip("vit").model, small_clip("resnet").model
    for model, pretrained, micro_batch_size, value in (
        (vit, True, 2, WHOLE),
        (resnet, True, 8, WHOLE),
        (resnet, True, 2, FROZEN),
        (resnet, False, 2, PASSING),
    ):
        choice = choose_batch_norm(
            model, pretrained=pretrained, batch_size=8, micro_batch_size=micro_batch_size
        )
        assert (choice.subject, choice.value) == ("batch_norm", value)
        assert choice.reason
