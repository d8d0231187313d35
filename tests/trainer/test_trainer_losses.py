from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from open_clip.loss import ClipLoss
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import SumReducer
from torch import Tensor
from torch.nn import functional as F

from cliptune_trainer.losses import LOSSES, Contrast, Identities, loss_for
from cliptune_trainer.losses.catalog import ROBUST_FORM
from tests.trainer.contrasts import alone, contrast, features, identities, leaves

SCALE = 20.0


def value(name: str, given: Contrast, **parameters: float) -> float:
    return float(loss_for(name, tiled=False, **parameters)(given).detach())


def test_infonce_and_its_gradients_equal_open_clips_loss() -> None:
    ours, theirs = contrast(12, scale=37.0), leaves(contrast(12, scale=37.0))
    loss, reference = loss_for("infonce", tiled=False)(ours), ClipLoss()(*theirs)
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    loss.backward()
    reference.backward()
    for one, other in zip(leaves(ours), theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


# -- each loss is the formula of its paper, written out row by row in float64


def rows_of(table: Tensor) -> list[tuple[list[float], int]]:
    """Each image's row and each text's column, with the place of its own partner."""
    sides = (table.tolist(), table.T.tolist())
    return [(line, place) for side in sides for place, line in enumerate(side)]


def repeated(rows: int) -> tuple[Identities, Callable[[int, int], bool]]:
    images = [0, 0, *range(1, rows - 1)]
    captions = [*range(rows - 1), 2]
    who = identities(images, captions, [[row % 3 == 0, row % 2 == 0] for row in range(rows)])
    return who, lambda i, j: images[i] == images[j] or captions[i] == captions[j]


def test_multi_positive_equals_a_float64_sum_over_each_rows_positives() -> None:
    who, same = repeated(9)
    given = contrast(9, torch.float64, who=who)
    total = 0.0
    for line, i in rows_of((SCALE * given.similarities()).detach()):
        positives = [j for j in range(9) if same(i, j)]
        norm = math.log(sum(math.exp(x) for x in line))
        total -= sum(line[j] - norm for j in positives) / len(positives)
    assert value("multi_positive", given) == pytest.approx(total / 18, rel=1e-12)
    assert value("multi_positive", contrast(9, who=who)) == pytest.approx(total / 18, rel=1e-5)


def test_multi_positive_by_label_is_supcon_between_the_towers() -> None:
    labels = [0, 1, 2, 0, 1, 0, 2]
    one_hot = F.one_hot(torch.tensor(labels)).tolist()
    given = contrast(7, torch.float64, who=identities(range(7), range(7), one_hot))
    supcon = SupConLoss(temperature=1 / SCALE)
    image_ND, text_ND = features(7, torch.float64)
    classes = torch.tensor(labels)
    both = [supcon(image_ND, classes, ref_emb=text_ND, ref_labels=classes.clone())]
    both.append(supcon(text_ND, classes, ref_emb=image_ND, ref_labels=classes.clone()))
    expected = 0.5 * float((both[0] + both[1]).detach())
    assert value("multi_positive", given, labels=1.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["multi_positive", "hard_negative"])
def test_without_repeats_it_is_infonce(name: str) -> None:
    parameters = {"beta": 0.0} if name == "hard_negative" else {}
    given = contrast(7, torch.float64)
    assert value(name, given, **parameters) == pytest.approx(value("infonce", given), rel=1e-12)


def test_infonce_equals_metric_learnings_nt_xent_between_the_towers() -> None:
    image_ND, text_ND = features(8, torch.float64)
    rows = torch.arange(8)
    ntxent = NTXentLoss(temperature=1 / SCALE)
    sides = ((image_ND, text_ND), (text_ND, image_ND))
    both = [float(ntxent(one, rows, ref_emb=other, ref_labels=rows.clone()).detach()) for one, other in sides]
    assert value("infonce", contrast(8, torch.float64)) == pytest.approx(sum(both) / 2, rel=1e-6)


def test_soft_target_equals_the_cross_entropy_with_softened_label_similarity() -> None:
    labels = [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1]]
    given = contrast(5, torch.float64, who=identities(range(5), range(5), labels))

    def cosine(one: list[int], other: list[int]) -> float:
        norms = math.sqrt(sum(one)) * math.sqrt(sum(other))
        return sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0

    for sharpness in (1.0, 5.0):
        total = 0.0
        for line, i in rows_of((SCALE * given.similarities()).detach()):
            alike = [1.0 if i == j else cosine(labels[i], labels[j]) for j in range(5)]
            weights = [math.exp(sharpness * s) for s in alike]
            norm = math.log(sum(math.exp(x) for x in line))
            total -= sum(w / sum(weights) * (x - norm) for w, x in zip(weights, line, strict=True))
        found = value("soft_target", given, sharpness=sharpness)
        assert found == pytest.approx(total / 10, rel=1e-6)  # labels are fp32


def test_a_very_sharp_soft_target_is_multi_positive_by_label() -> None:
    who = identities(range(6), range(6), [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])
    given = contrast(6, torch.float64, who=who)
    sharp = value("soft_target", given, sharpness=100.0)
    assert sharp == pytest.approx(value("multi_positive", given, labels=1.0), rel=1e-9)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.25), (0.5, 1.0), (0.0, 0.5)])
def test_hard_negative_weighs_each_negative_as_hn_nce_does(alpha: float, beta: float) -> None:
    who, same = repeated(8)
    given = contrast(8, torch.float64, who=who)
    total = 0.0
    for line, i in rows_of((SCALE * given.similarities()).detach()):
        negatives = [x for j, x in enumerate(line) if not same(i, j)]
        hardness = [math.exp(beta * x) for x in negatives]
        weights = [len(negatives) * h / sum(hardness) for h in hardness]
        below = sum(w * math.exp(x) for w, x in zip(weights, negatives, strict=True))
        total -= math.log(math.exp(line[i]) / (alpha * math.exp(line[i]) + below))
    assert value("hard_negative", given, alpha=alpha, beta=beta) == pytest.approx(total / 16, rel=1e-12)


def test_decoupled_leaves_the_positive_out_of_the_denominator() -> None:
    who, same = repeated(8)
    given = contrast(8, torch.float64, who=who)
    total = 0.0
    for line, i in rows_of((SCALE * given.similarities()).detach()):
        total -= line[i] - math.log(sum(math.exp(x) for j, x in enumerate(line) if not same(i, j)))
    assert value("decoupled", given) == pytest.approx(total / 16, rel=1e-12)


def test_hard_caption_adds_wrong_captions_to_each_images_texts_alone() -> None:
    rows = 5
    given = contrast(rows, torch.float64)
    negative_MD = features(rows, torch.float64, seed=2)[1]
    # Row 1's wrong caption happens to be row 3's true one; row 4 has none.
    given = replace(given, negative_text_MP=negative_MD, negative_ids_M=torch.tensor([-1, 3, -1, -1, -2]))
    table = (SCALE * given.similarities()).tolist()
    wrong = (SCALE * given.image_NP @ negative_MD.T).tolist()
    total = 0.0
    for i in range(rows):
        met = [wrong[i][m] for m in range(4) if (i, m) != (3, 1)]
        total += math.log(sum(math.exp(x) for x in [*table[i], *met])) - table[i][i]
        total += math.log(sum(math.exp(line[i]) for line in table)) - table[i][i]
    assert value("hard_caption", given) == pytest.approx(total / (2 * rows), rel=1e-12)
    assert value("hard_caption", given) > value("infonce", given)


def test_cyclip_adds_both_consistencies_to_infonce() -> None:
    given = contrast(6, torch.float64)
    images, texts = given.image_NP.detach(), given.text_NP.detach()
    cross = within = 0.0
    for j in range(6):
        for k in range(6):
            cross += float(images[j] @ texts[k] - images[k] @ texts[j]) ** 2
            within += float(images[j] @ images[k] - texts[j] @ texts[k]) ** 2
    plain = value("infonce", given)
    expected = plain + 0.25 * cross / 6 + 0.25 * within / 6
    assert value("cyclip", given) == pytest.approx(expected, rel=1e-12)
    weighed = value("cyclip", given, in_modal=2.0, cross_modal=0.0)
    assert weighed == pytest.approx(plain + 2.0 * within / 6, rel=1e-12)
    assert value("cyclip", given, in_modal=0.0, cross_modal=0.0) == plain


def test_margin_equals_metric_learnings_triplet_loss() -> None:
    image_ND, text_ND = features(7, torch.float64)
    rows = torch.arange(7)
    triplet = TripletMarginLoss(margin=0.4, distance=CosineSimilarity(), reducer=SumReducer())
    sides = ((image_ND, text_ND), (text_ND, image_ND))
    both = sum(
        float(triplet(one, rows, ref_emb=other, ref_labels=rows.clone()).detach()) for one, other in sides
    )
    given = contrast(7, torch.float64)
    assert value("margin", given, margin=0.4) == pytest.approx(both / 14, rel=1e-9)


def test_margin_by_the_hardest_negative_passes_over_rows_that_belong_together() -> None:
    who, same = repeated(8)
    given = contrast(8, torch.float64, who=who)
    total = 0.0
    for line, i in rows_of(given.similarities().detach()):
        total += max(max(0.0, 0.2 + x - line[i]) for j, x in enumerate(line) if not same(i, j))
    assert value("margin", given, hardest=1.0) == pytest.approx(total / 16, rel=1e-12)


def test_distillation_is_the_divergence_from_the_starting_model_and_0_at_the_start() -> None:
    given = contrast(6, torch.float64, full=True)
    assert given.teacher is not None
    teacher = given.teacher.logits().detach()
    total = 0.0
    student = (SCALE * given.similarities()).detach()
    for of_teacher, of_student in ((teacher, student), (teacher.T, student.T)):
        p, q = torch.softmax(of_teacher, 1), torch.softmax(of_student, 1)
        total += float((p * (p / q).log()).sum()) / 6
    assert value("distillation", given) == pytest.approx(total / 2, rel=1e-9)
    unchanged = replace(
        given,
        teacher=replace(
            given.teacher,
            image_ND=given.image_NP.detach(),
            text_ND=given.text_NP.detach(),
            logit_scale=given.logit_scale.detach(),
        ),
    )
    assert value("distillation", unchanged) == pytest.approx(0.0, abs=1e-12)


def test_the_robust_form_is_fastclips_global_loss_of_the_batch() -> None:
    who, same = repeated(8)
    given = contrast(8, torch.float64, who=who)
    temperature, share = 1 / SCALE, 0.3
    total = radius = 0.0
    for line, i in rows_of(given.similarities().detach()):
        negatives = [x for j, x in enumerate(line) if not same(i, j)]
        g = sum(math.exp((x - line[i]) / temperature) for x in negatives) / len(negatives)
        total += temperature * math.log(1e-14 + g)
        radius += share * math.log(len(negatives))
    expected = total / 16 + temperature * radius / 16
    found = float(ROBUST_FORM.function(given, concentration=share).detach())
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_robust_forms_best_temperature_has_the_divergence_that_was_asked_for() -> None:
    image_ND, text_ND = (one.detach() for one in features(40, torch.float64))
    share = 0.4

    def slope(log_scale: float) -> float:
        scale = torch.tensor(log_scale, dtype=torch.float64, requires_grad=True)
        given = Contrast(image_NP=image_ND, text_NP=text_ND, logit_scale=scale.exp(), identities=alone(40))
        return float(torch.autograd.grad(ROBUST_FORM.function(given, concentration=share), scale)[0])

    low, high = 0.0, 8.0  # of the logarithm of the scale; the loss falls, then rises
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    others = ~torch.eye(40, dtype=torch.bool)
    divergences = []
    for table in (image_ND @ text_ND.T, text_ND @ image_ND.T):
        weights = torch.softmax((math.exp(low) * table).masked_fill(~others, -torch.inf), dim=1)
        divergences.append((weights * (weights * 39).clamp(min=1e-300).log()).sum(dim=1).mean())
    assert float(sum(divergences)) / 2 == pytest.approx(share * math.log(39), rel=1e-6)


# -- what every loss owes


def every() -> list[tuple[str, dict[str, float]]]:
    return [
        *((name, {}) for name in LOSSES),
        ("multi_positive", {"labels": 1.0}),
        ("hard_negative", {"alpha": 0.0}),
        ("margin", {"hardest": 1.0}),
    ]


@pytest.mark.parametrize(("name", "parameters"), every())
def test_its_gradient_is_that_of_finite_differences(name: str, parameters: dict[str, float]) -> None:
    given = contrast(6, torch.float64, full=True)
    entry = LOSSES[name]
    loss = loss_for(name, tiled=False, **parameters)
    tensors = [given.image_NP, given.text_NP, given.logit_scale]

    def of(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return loss(replace(given, image_NP=images, text_NP=texts, logit_scale=scale))

    assert torch.autograd.gradcheck(of, tensors)
    assert entry.told
    assert set(parameters) <= set(entry.parameters)


@pytest.mark.parametrize(("name", "parameters"), every())
def test_half_precision_features_are_compared_in_fp32(name: str, parameters: dict[str, float]) -> None:
    given = contrast(6, full=True)
    halves = replace(given, image_NP=given.image_NP.bfloat16(), text_NP=given.text_NP.bfloat16())
    loss = loss_for(name, tiled=False, **parameters)(halves)
    assert loss.dtype == torch.float32
    widened = replace(halves, image_NP=halves.image_NP.float(), text_NP=halves.text_NP.float())
    assert float(loss.detach()) == pytest.approx(value(name, widened, **parameters), rel=1e-6)


@pytest.mark.parametrize(("name", "parameters"), every())
def test_rows_that_all_belong_together_give_no_number_that_is_none(
    name: str, parameters: dict[str, float]
) -> None:
    who = identities([0] * 4, [0] * 4, [[1, 0]] * 4)
    for scale in (1.0, 100.0):
        given = contrast(4, scale=scale, who=who, full=True)
        loss = loss_for(name, tiled=False, **parameters)(given)
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(loss)
        for leaf in leaves(given):
            assert leaf.grad is None or bool(torch.isfinite(leaf.grad).all()), name
    robust = ROBUST_FORM.function(contrast(4, who=who))
    robust.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(robust)


def test_a_loss_without_what_it_needs_says_so() -> None:
    given = contrast(4)
    for name, told in (
        ("sigmoid", "logit bias"),
        ("soft_target", "labels"),
        ("hard_caption", "wrong captions"),
        ("distillation", "starting model"),
    ):
        with pytest.raises(ValueError, match=told):
            loss_for(name, tiled=False)(given)
    with pytest.raises(ValueError, match="labels"):
        loss_for("multi_positive", tiled=False, labels=1.0)(given)
    with pytest.raises(ValueError, match="whole table"):
        loss_for("margin", tiled=True)


def test_labels_count_in_tiles_too() -> None:
    given = contrast(40, torch.float64, full=True)
    tiles = loss_for("multi_positive", tiled=True, block=16, labels=1.0)(given)
    assert float(tiles.detach()) == pytest.approx(value("multi_positive", given, labels=1.0), rel=1e-12)
    assert value("multi_positive", given, labels=1.0) != pytest.approx(value("multi_positive", given))
