from __future__ import annotations

import math
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from google.protobuf import json_format

from cliptune.errors import SpecError
from cliptune.v1 import spec_pb2
from cliptune_model.clip import Clip
from cliptune_model.similarity import similarity_for
from cliptune_trainer.losses import LOSSES
from cliptune_trainer.losses.config import LossConfig, Term
from cliptune_trainer.losses.objective import Features, Objective
from cliptune_trainer.losses.sizing import choose_objective_tiling, objective_bytes
from cliptune_trainer.losses.temperature import begin, clamp, hold
from cliptune_trainer.memory.count import LiveBytes
from cliptune_trainer.spec.loss import loss_config
from cliptune_trainer.steps.optim import build_optimizer, load_state_tensors, state_tensors
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.step import Step
from tests.trainer.contrasts import identities, towers_of
from tests.trainer.ranks import CONFIGS, features_of, gradients_of, gradients_of_rank, scales
from tests.trainer.towers import small_batch, small_clip

TIMEOUT_S = 120


def terms(*names: str) -> tuple[Term, ...]:
    return tuple(Term(name=name) for name in names)


def told(message: spec_pb2.LossSpec) -> SpecError:
    with pytest.raises(SpecError) as caught:
        loss_config(message)
    assert caught.value.metadata["path"] in caught.value.message
    return caught.value


# -- what a spec may say


def test_an_unknown_loss_or_parameter_is_refused_with_the_nearest_names() -> None:
    error = told(spec_pb2.LossSpec(name="multipositive"))
    assert error.metadata["path"] == "loss.name"
    assert "did you mean 'multi_positive'" in error.message
    assert "cyclip" in error.metadata["allowed"]
    error = told(spec_pb2.LossSpec(terms=[{"name": "infonce"}, {"name": "margins"}]))
    assert error.metadata["path"] == "loss.terms[1].name"
    error = told(spec_pb2.LossSpec(name="margin", parameters={"margn": 0.2}))
    assert error.metadata == {"path": "loss.parameters.margn", "allowed": "margin, hardest"}
    assert "did you mean 'margin'" in error.message
    assert told(spec_pb2.LossSpec(name="infonce", parameters={"x": 1})).metadata["allowed"] == "none"


@pytest.mark.parametrize(
    ("message", "path", "allowed"),
    [
        ({"name": "margin", "parameters": {"margin": -1.0}}, "loss.parameters.margin", "1e-06 to 100"),
        ({"name": "margin", "parameters": {"margin": math.nan}}, "loss.parameters.margin", "to 100"),
        ({"name": "infonce", "terms": [{"name": "margin"}]}, "loss.name", "one of the two"),
        ({"parameters": {"a": 1}, "terms": [{"name": "margin"}]}, "loss.parameters", "one of the two"),
        ({"terms": [{"name": "margin", "weight": 0.0}]}, "loss.terms[0].weight", "above 0"),
        ({"weighting": "learned"}, "loss.weighting", "fixed, uncertainty"),
        ({"weighting": "uncertainty"}, "loss.weighting", "two loss.terms"),
        (
            {"weighting": "uncertainty", "terms": [{"name": "infonce"}, {"name": "decoupled"}]},
            "loss.weighting",
            "fall below 0",
        ),
        ({"temperature": "warm"}, "loss.temperature", "learned, fixed, global"),
        ({"temperature": "global", "name": "sigmoid"}, "loss.temperature", "infonce"),
        ({"logit_scale": 0.5}, "loss.logit_scale", "1 to loss.max_logit_scale"),
        ({"logit_scale": 120.0}, "loss.logit_scale", "1 to loss.max_logit_scale, 100"),
        ({"max_logit_scale": 1.0}, "loss.max_logit_scale", "above 1"),
        ({"matryoshka_dims": [8, 8]}, "loss.matryoshka_dims[1]", "larger than the one before"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(
    message: dict[str, object], path: str, allowed: str
) -> None:
    error = told(spec_pb2.LossSpec(**message))  # type: ignore[arg-type]
    assert error.metadata["path"] == path
    assert allowed in error.metadata["allowed"]


def test_every_field_reaches_the_config() -> None:
    found = loss_config(
        spec_pb2.LossSpec(
            tiling="off",
            terms=[
                {"name": "multi_positive", "parameters": {"labels": 1.0}},
                {"name": "margin", "weight": 2.5},
            ],
            weighting="uncertainty",
            temperature="fixed",
            logit_scale=14.0,
            max_logit_scale=50.0,
            matryoshka_dims=[8, 16],
        )
    )
    assert found.names == ("multi_positive", "margin")
    assert [term.weight for term in found.terms] == [1.0, 2.5]
    assert found.needs == {"labels"}
    assert (found.tiling, found.weighting, found.temperature) == ("off", "uncertainty", "fixed")
    assert (found.logit_scale, found.max_logit_scale, found.matryoshka_dims) == (14.0, 50.0, (8, 16))
    assert loss_config(spec_pb2.LossSpec()) == LossConfig()
    assert LossConfig(terms=terms("multi_positive")).needs == frozenset()
    with pytest.raises(SpecError, match="fewer than the embedding's 16"):
        found.check_dimensions(16)


def test_the_guide_tells_every_loss_and_parameter_and_its_examples_are_specs() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    lines = {line.split("`")[1]: line for line in guide.splitlines() if line.startswith("| `")}
    for name, entry in LOSSES.items():
        for key, parameter in entry.parameters.items():
            assert f"`{key}`" in lines[name]
            assert f"({parameter.default:g}; {parameter.allowed})" in lines[name]
    examples = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    for example in examples:
        spec = spec_pb2.JobSpec()
        json_format.ParseDict(tomllib.loads(example), spec)
        assert loss_config(spec.loss) != LossConfig()
    assert len(examples) == 3


# -- what it computes


def test_terms_are_added_with_their_weights() -> None:
    clip, features = small_clip("siglip"), towers_of(6, torch.float64)
    parts = {name: Objective(LossConfig(terms=terms(name)))(clip, features) for name in LOSSES}
    weighed = LossConfig(terms=tuple(Term(name=name, weight=1.0 + i) for i, name in enumerate(LOSSES)))
    expected = sum((1.0 + i) * float(parts[name].detach()) for i, name in enumerate(LOSSES))
    assert float(Objective(weighed)(clip, features).detach()) == pytest.approx(expected, rel=1e-12)
    assert Objective(weighed).weights() == [1.0 + i for i in range(len(LOSSES))]


@pytest.mark.parametrize("block", [None, 4], ids=["whole", "tiled"])
def test_a_scale_and_a_bias_of_one_number_each_in_a_row_are_scalars_to_a_loss(block: int | None) -> None:
    given, features = scales(), features_of(slice(None))
    expected = {name: Objective(config, block=block)(given, features) for name, config in CONFIGS.items()}
    for name in ("logit_scale", "logit_bias"):
        setattr(given.model, name, torch.nn.Parameter(getattr(given.model, name).detach().reshape(1)))
    for name, config in CONFIGS.items():
        value = Objective(config, block=block)(given, features)
        torch.testing.assert_close(value, expected[name])
        value.backward()  # type: ignore[no-untyped-call]
    assert given.model.logit_scale.grad.shape == (1,)


def test_matryoshka_is_the_mean_over_the_first_dimensions_and_all() -> None:
    clip, features = small_clip("vit"), towers_of(6, torch.float64)
    nested = Objective(LossConfig(matryoshka_dims=(4, 16)))(clip, features)
    each = [
        Objective()(
            clip,
            replace(features, image_ND=features.image_ND[:, :width], text_ND=features.text_ND[:, :width]),
        )
        for width in (4, 16, 32)
    ]
    assert float(nested.detach()) == pytest.approx(float(sum(each).detach()) / 3, rel=1e-12)  # type: ignore[union-attr]


@pytest.mark.parametrize("similarity", ["dot", "squared_euclidean", "angular", "mahalanobis", "lorentz"])
def test_every_loss_goes_by_the_models_own_similarity(similarity: str) -> None:
    clip = replace(small_clip("siglip"), similarity=similarity_for(similarity, 32).double())
    features = towers_of(6, torch.float64)
    small = replace(
        features,
        image_ND=(0.2 * features.image_ND).detach().requires_grad_(),
        text_ND=(0.2 * features.text_ND).detach().requires_grad_(),
    )
    logits_NN = clip.model.logit_scale.exp() * clip.similarity(small.image_ND, small.text_ND)  # type: ignore[operator]
    rows = torch.arange(6)
    expected = torch.nn.functional.cross_entropy(logits_NN, rows)
    expected = 0.5 * (expected + torch.nn.functional.cross_entropy(logits_NN.T, rows))
    assert float(Objective()(clip, small).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name in LOSSES:
        value = Objective(LossConfig(terms=terms(name), matryoshka_dims=(8,)))(clip, small)
        value.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(value), name
        assert small.image_ND.grad is not None
        assert bool(torch.isfinite(small.image_ND.grad).all()), name
    if list(clip.similarity.parameters()):
        assert all(one.grad is not None for one in clip.similarity.parameters())


def test_a_learned_weight_falls_for_the_larger_loss_and_stays_within_bounds() -> None:
    config = LossConfig(
        terms=(Term(name="infonce", weight=5.0), Term(name="margin", weight=0.01)), weighting="uncertainty"
    )
    clip, objective = small_clip("vit"), Objective(config)
    assert objective.weights() == [5.0, 0.01]
    optimizer = build_optimizer(clip.model, learning_rate=0.05, weight_decay=0.1, beside={"loss": objective})
    step = Step(clip, objective, optimizer, Precision("fp32", "cpu"), clip_norm=1.0)
    batch = small_batch(6)
    for _ in range(4):
        step(batch, 0.05)
    first, second = objective.weights()
    assert first < 5.0
    assert second > 0.01
    assert objective.log_variances is not None
    with torch.no_grad():
        objective.log_variances.copy_(torch.tensor([9.0, -9.0]))
    objective.constrain(clip)
    assert objective.log_variances.tolist() == [4.0, -4.0]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert "loss.log_variances" in names
    saved = {name: value.clone() for name, value in state_tensors(optimizer).items()}
    fresh = build_optimizer(
        clip.model, learning_rate=0.05, weight_decay=0.1, beside={"loss": Objective(config)}
    )
    load_state_tensors(fresh, saved)
    assert state_tensors(fresh).keys() == saved.keys()


# -- the temperature


def scale_of(clip: Clip) -> float:
    return float(clip.model.logit_scale.detach().exp())  # type: ignore[operator]


def stepped(clip: Clip, config: LossConfig, steps: int = 3, learning_rate: float = 0.3) -> float:
    hold(clip.model, config)
    objective = Objective(config)
    optimizer = build_optimizer(clip.model, learning_rate=learning_rate, weight_decay=0.1)
    step = Step(clip, objective, optimizer, Precision("fp32", "cpu"), clip_norm=1.0)
    for _ in range(steps):
        step(small_batch(6), learning_rate)
    return scale_of(clip)


def test_a_fixed_scale_is_what_was_asked_for_and_stays() -> None:
    clip, config = small_clip("vit"), LossConfig(temperature="fixed", logit_scale=0.5)
    choice = begin(clip.model, config)
    assert (choice.subject, choice.value) == ("logit_scale", "0.5")
    assert "stays" in choice.reason
    assert stepped(clip, config) == pytest.approx(0.5, rel=1e-6)


def test_a_learned_scale_begins_where_it_is_told_and_keeps_to_its_bounds() -> None:
    clip, config = small_clip("vit"), LossConfig(logit_scale=20.0, max_logit_scale=21.0)
    assert begin(clip.model, config).value == "20"
    assert scale_of(clip) == pytest.approx(20.0)
    with torch.no_grad():
        clip.model.logit_scale.fill_(6.0)  # type: ignore[operator]
    clamp(clip.model, config)
    assert scale_of(clip) == pytest.approx(21.0)
    assert 1.0 <= stepped(clip, config) <= 21.0 * (1 + 1e-6)
    assert begin(small_clip("vit").model, LossConfig()).reason.startswith("the model's")


def test_a_learned_bias_stays_within_what_scaled_cosines_can_reach() -> None:
    config = LossConfig(terms=terms("sigmoid"), max_logit_scale=50.0)
    for similarity, kept in (("cosine", -50.0), ("squared_euclidean", -80.0)):
        clip = replace(small_clip("siglip"), similarity=similarity_for(similarity, 32))
        with torch.no_grad():
            clip.model.logit_bias.fill_(-80.0)  # type: ignore[operator]
        Objective(config).constrain(clip)
        assert float(clip.model.logit_bias.detach()) == kept  # type: ignore[operator]


def test_a_global_temperature_rises_where_infonces_would_fall_for_ever() -> None:
    """Pairs that are told apart: a softmax only gets sharper, the robust form settles."""
    generator = torch.Generator().manual_seed(0)
    rows = 24
    text_ND = torch.randn(rows, 32, generator=generator)
    features = Features(
        image_ND=text_ND + 0.5 * torch.randn(rows, 32, generator=generator),
        text_ND=text_ND,
        identities=identities(range(rows), range(rows)),
    )
    slopes = {}
    for temperature in ("learned", "global"):
        clip = small_clip("vit")
        with torch.no_grad():
            clip.model.logit_scale.fill_(math.log(20.0))  # type: ignore[operator]
        value = Objective(LossConfig(temperature=temperature))(clip, features)
        value.backward()  # type: ignore[no-untyped-call]
        slopes[temperature] = float(clip.model.logit_scale.grad)  # type: ignore[arg-type]
    assert slopes["learned"] < 0 < slopes["global"]


# -- whole tables and tiles


def test_tiles_are_for_objectives_whose_terms_and_similarity_all_can_be() -> None:
    def value(config: LossConfig, similarity: str = "cosine", n: int = 65_536, device: str = "cuda") -> str:
        return choose_objective_tiling(config, similarity_for(similarity, 32), n, 32, device).value

    tileable = LossConfig(terms=terms("infonce", "multi_positive"))
    assert value(tileable).isdigit()
    assert value(tileable, "squared_euclidean").isdigit()
    assert value(tileable, "angular") == "off"
    assert value(LossConfig(terms=terms("infonce", "margin"))) == "off"
    for config, similarity, who in (
        (LossConfig(terms=terms("infonce", "margin"), tiling="on"), "cosine", "'margin'"),
        (LossConfig(tiling="on"), "angular", "'angular'"),
    ):
        with pytest.raises(SpecError, match=who) as caught:
            value(config, similarity)
        assert caught.value.metadata["path"] == "loss.tiling"
    with pytest.raises(SpecError, match=r"train\.batch_size"):
        value(LossConfig(terms=terms("margin")), n=32_768, device="mps")


def test_composed_tiles_give_the_loss_of_whole_tables() -> None:
    clip, features = small_clip("siglip"), towers_of(40, torch.float64)
    config = LossConfig(
        terms=(
            Term(name="infonce"),
            Term(name="sigmoid", weight=0.1),
            Term(name="multi_positive", parameters={"labels": 1.0}),
        ),
        matryoshka_dims=(8,),
    )
    values = [float(Objective(config, block=block)(clip, features).detach()) for block in (None, 16)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


@pytest.mark.parametrize("name", [*LOSSES, "robust", "composed", "angular"])
def test_the_estimate_holds_what_an_objective_takes(name: str) -> None:
    rows = 512
    config = {
        "robust": LossConfig(temperature="global"),
        "composed": LossConfig(terms=terms("infonce", "hard_negative"), matryoshka_dims=(8,)),
        "angular": LossConfig(),
    }.get(name) or LossConfig(terms=terms(name))
    similarity = similarity_for("angular" if name == "angular" else "cosine", 32)
    clip, features = replace(small_clip("siglip"), similarity=similarity), towers_of(rows)
    tiling = choose_objective_tiling(replace(config, tiling="off"), similarity, rows, 32, "cpu")
    with LiveBytes("cpu") as live:
        Objective(config)(clip, features).backward()  # type: ignore[no-untyped-call]
    estimated = objective_bytes(config, similarity, rows, 32, tiling)
    assert 0.5 * estimated < live.peak <= estimated


# -- several ranks


def test_the_mean_over_ranks_of_their_gradients_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'meeting'}"
    other = subprocess.Popen([sys.executable, "-m", "tests.trainer.ranks", meeting, str(tmp_path / "1.pt")])
    try:
        found = [gradients_of_rank(0, meeting)]
        assert other.wait(TIMEOUT_S) == 0
    finally:
        other.kill()
        other.wait()
    found.append(torch.load(tmp_path / "1.pt"))
    for name, (value, scale, *of_features) in gradients_of(slice(None)).items():
        for rank in found:  # the whole loss, and the whole gradient of what every rank has
            torch.testing.assert_close(rank[name][0], value)
            torch.testing.assert_close(rank[name][1], scale)
        for place, expected in enumerate(of_features, start=2):
            # A rank's rows have theirs times the number of ranks, which the mean over ranks takes back.
            parts = torch.cat([rank[name][place] for rank in found]) / 2
            torch.testing.assert_close(parts, expected, msg=name)
