"""Training less than everything: adapters, frozen towers, rates by layer, a probe before fine-tuning."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cliptune.errors import ConflictError, SpecError
from cliptune.spec import spec_from_mapping
from cliptune_model.adapters import AdapterConfig, load_adapted
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.machine.workload import Workload
from cliptune_model.source import ModelSource
from cliptune_trainer.losses.config import LossConfig
from cliptune_trainer.losses.objective import Objective
from cliptune_trainer.spec import Spec
from cliptune_trainer.spec.whole import from_proto
from cliptune_trainer.steps.accumulation import accumulate, loss_of_features
from cliptune_trainer.steps.batch_norm import BatchNorms
from cliptune_trainer.steps.checkpointing import enable_checkpointing
from cliptune_trainer.steps.depth import layer_shares
from cliptune_trainer.steps.optim import build_optimizer
from cliptune_trainer.steps.parts import parts_of
from cliptune_trainer.steps.precision import Precision
from cliptune_trainer.steps.probing import LinearProbe
from cliptune_trainer.steps.trainable import make_trainable
from tests.trainer.conftest import MakeJob
from tests.trainer.towers import gradients, small_batch, small_clip

FP32 = Precision("fp32", torch.device("cpu"))
LORA = {"kind": "lora", "rank": 2}


def spec(**parts: Any) -> Spec:
    base = {"name": "job", "model": {"name": "cliptune-test-vit"}, "data": {"train": "tiles.csv"}}
    return from_proto(spec_from_mapping({**base, **parts}))


def lora_clip(kind: str = "vit", **adapter: Any) -> Clip:
    """In training, its last matrices no longer zeros."""
    clip, _ = make_trainable(small_clip(kind), spec(adapter={**LORA, **adapter}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in clip.model.named_parameters():
        if name.endswith(".up"):
            parameter.data.normal_(std=0.1, generator=generator)
    clip.model.train()
    BatchNorms(clip.model).prepare()
    return clip


def objective() -> Objective:
    return Objective(LossConfig())


def test_the_gradient_of_parts_is_exact_with_the_dropout_of_each_part() -> None:
    clip, batch = lora_clip(dropout=0.4), small_batch(7)
    torch.manual_seed(4)
    loss = accumulate(clip, objective(), FP32, batch, 3)
    found = gradients(clip)
    # The same masks, all graphs at once: first all parts but the last of images, of texts, then the last.
    torch.manual_seed(4)
    images, texts, rows = batch.images_B3HW[:], batch.tokens_BL, parts_of(7, 3)
    early_images = [clip.encode_images(images[one]) for one in rows[:2]]
    early_texts = [clip.encode_texts(texts[one]) for one in rows[:2]]
    image_ND = torch.cat([*early_images, clip.encode_images(images[rows[2]])])
    text_ND = torch.cat([*early_texts, clip.encode_texts(texts[rows[2]])])
    whole = loss_of_features(clip, objective(), batch, image_ND, text_ND)
    whole.backward()  # type: ignore[no-untyped-call]
    wanted = gradients(clip)
    torch.testing.assert_close(loss, whole.detach())
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(".adapter." in name or name.startswith("logit") for name in found)


def test_recomputed_activations_draw_the_same_dropout() -> None:
    found = []
    for recompute in (False, True):
        clip = lora_clip(dropout=0.4)
        if recompute:
            enable_checkpointing(clip)
        torch.manual_seed(5)
        accumulate(clip, objective(), FP32, small_batch(6), 3)
        found.append(gradients(clip))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_batch_statistics_stay_the_bases_under_an_adapter() -> None:
    clip = lora_clip("timm-resnet")
    before = [one.clone() for one in clip.model.buffers()]
    accumulate(clip, objective(), FP32, small_batch(4), 2)
    assert all(map(torch.equal, before, clip.model.buffers()))


@pytest.mark.parametrize(("tower", "other"), [("image", "text"), ("text", "image")])
@pytest.mark.parametrize("kind", ["vit", "dropout", "timm-resnet"])
def test_a_frozen_tower_makes_no_graph_draws_nothing_and_keeps_its_statistics(
    kind: str, tower: str, other: str
) -> None:
    clip, choices = make_trainable(small_clip(kind), spec(train={"freeze": {tower: True}}))
    assert [(one.subject, one.value) for one in choices] == [(f"{tower} tower", "frozen")]
    clip.model.train()
    BatchNorms(clip.model).prepare()
    batch = small_batch(4)
    features = {
        "image": lambda: clip.encode_images(batch.images_B3HW[:]),
        "text": lambda: clip.encode_texts(batch.tokens_BL),
    }
    assert not features[tower]().requires_grad
    assert features[other]().requires_grad
    torch.testing.assert_close(features[tower](), features[tower](), rtol=0, atol=0)
    accumulate(clip, objective(), FP32, batch, 2)
    assert {name.startswith("visual.") for name in gradients(clip) if not name.startswith("logit")} == {
        other == "image"
    }


def test_memory_holds_no_gradient_and_no_moments_of_what_is_not_trained() -> None:
    def state_bytes(**parts: Any) -> int:
        clip, _ = make_trainable(build(ModelSource(name="cliptune-test-vit")), spec(**parts))
        return Workload.of(clip, batch_size=8, image_tokens=17).state_bytes()

    clip = build(ModelSource(name="cliptune-test-vit"))
    weights = sum(one.numel() for one in clip.model.parameters())
    image = sum(one.numel() for one in clip.model.get_submodule("visual").parameters())
    assert state_bytes() == 16 * weights
    assert state_bytes(train={"freeze": {"image": True}}) == 16 * weights - 12 * image
    assert state_bytes(adapter=LORA) < 4.5 * weights


def test_rates_fall_from_layer_to_layer_down_to_the_embeddings() -> None:
    clip = small_clip("vit")
    shares = layer_shares(clip.model, 0.5)
    assert shares["visual.proj"] == shares["text_projection"] == shares["logit_scale"] == 1.0
    assert shares["visual.transformer.resblocks.1.ln_1.weight"] == 0.5
    assert shares["transformer.resblocks.0.mlp.c_fc.weight"] == 0.25
    assert shares["visual.conv1.weight"] == shares["token_embedding.weight"] == 0.125
    optimizer = build_optimizer(clip.model, learning_rate=0.1, weight_decay=0.1, layer_decay=0.5)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates == {name: pytest.approx(0.1 * share) for name, share in shares.items()}


def test_a_probing_step_trains_the_projections_alone() -> None:
    clip = small_clip("vit")
    with LinearProbe(clip.model).probing():
        accumulate(clip, objective(), FP32, small_batch(4), 2)
    assert set(gradients(clip)) == {"visual.proj", "text_projection", "logit_scale"}
    accumulate(clip, objective(), FP32, small_batch(4), 2)
    assert len(gradients(clip)) == len(list(clip.model.parameters()))


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        ({"train": {"freeze": {"image": True, "text": True}}}, "train.freeze"),
        ({"train": {"probe_fraction": 0.1}, "adapter": LORA}, "train.probe_fraction"),
        ({"train": {"layer_decay": 0.0}}, "train.layer_decay"),
        ({"adapter": {"kind": "prefix"}}, "adapter.kind"),
        ({"adapter": {"kind": "lora", "targets": ["head"]}}, "adapter.targets[0]"),
        ({"adapter": {"kind": "bottleneck", "alpha": 1.0}}, "adapter.alpha"),
        ({"adapter": {"kind": "bottleneck"}, "publish": {"form": "merged"}}, "publish.form"),
        ({"publish": {"form": "adapter"}}, "publish.form"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_field(parts: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as raised:
        spec(**parts)
    assert raised.value.metadata["path"] == path


def test_defaults_are_those_of_each_kind() -> None:
    assert spec().adapter is None
    assert spec(adapter={"kind": "lora"}).adapter == AdapterConfig(rank=2, alpha=1.0, dropout=0.25)
    found = spec(adapter={"kind": "bottleneck"})
    assert found.adapter == AdapterConfig(kind="bottleneck", rank=16, alpha=8.0, dropout=0.0)
    assert found.adapter_alone


def test_a_checkpoint_of_another_adapter_is_refused() -> None:
    clip, _ = make_trainable(small_clip("vit"), spec(adapter=LORA))
    with pytest.raises(ConflictError, match="another adapter"):
        make_trainable(clip, spec(adapter={"kind": "lora", "rank": 3}))


def exported_base(folder: Path) -> Path:
    clip = build(ModelSource(name="cliptune-test-vit"), seed=2)
    export_model(clip, folder, manifest_of(clip))
    return folder


def vectors(clip: Clip) -> Tensor:
    with torch.no_grad():
        return clip.encode_texts(clip.tokenize(["a red tile", "a blue tile"]))


def test_a_job_trains_an_adapter_goes_on_from_a_checkpoint_and_publishes_the_merged_model(
    make_job: MakeJob, tmp_path: Path
) -> None:
    base = exported_base(tmp_path / "base")
    job = make_job(
        model={"name": f"local-dir:{base}"},
        train={"epochs": 2, "learning_rate": 0.01},
        adapter=LORA,
        guard={"off": True},
        checkpoint={"every_steps": 4, "keep": 10},
    )
    job.run("prepare", 1)
    decisions = {one.subject: one for event in job.journal(1) for one in event.event.plan.decisions}
    assert decisions["adapter"].choice == "lora, rank 2"
    job.run("run", 2)
    saved = sorted(job.folder.checkpoints.iterdir())
    assert all((one / "model" / "cliptune_adapter.safetensors").is_file() for one in saved)
    merged, alone = load_exported(job.folder.export), load_adapted(job.folder.export / "adapter")
    assert merged.adapter is None
    torch.testing.assert_close(vectors(merged), vectors(alone), rtol=0, atol=1e-5)
    assert not torch.allclose(vectors(merged), vectors(load_exported(base)), atol=1e-4)
    for newer in saved[1:]:
        shutil.rmtree(newer)
    job.run("run", 3)
    first, again = job.losses(2), job.losses(3)
    assert again
    assert again == {step: values for step, values in first.items() if step in again}


def test_a_job_may_publish_the_adapter_alone_of_one_tower(make_job: MakeJob, tmp_path: Path) -> None:
    base = exported_base(tmp_path / "base")
    job = make_job(
        model={"name": f"local-dir:{base}"},
        train={"max_steps": 2, "learning_rate": 0.01, "freeze": {"image": True}},
        adapter={"kind": "bottleneck"},
        guard={"off": True},
    )
    job.run("run", 1)
    files = {path.name for path in job.folder.export.iterdir()}
    assert "cliptune_adapter.safetensors" in files
    assert "open_clip_model.safetensors" not in files
    clip, before = load_exported(job.folder.export), load_exported(base)
    assert not torch.allclose(vectors(clip), vectors(before), atol=1e-5)
    with torch.no_grad():
        images_B3HW = torch.ones(1, 3, *clip.image_size)
        assert torch.equal(clip.encode_images(images_B3HW), before.encode_images(images_B3HW))


def test_a_job_probes_first_and_then_trains_all_layers_each_at_its_rate(
    make_job: MakeJob, tmp_path: Path
) -> None:
    base = exported_base(tmp_path / "base")
    job = make_job(
        model={"name": f"local-dir:{base}"},
        train={"max_steps": 4, "learning_rate": 0.01, "probe_fraction": 0.5, "layer_decay": 0.7},
        guard={"off": True},
        checkpoint={"every_steps": 2, "keep": 5},
    )
    job.run("run", 1)
    start, probed, trained = (
        load_exported(folder).model.state_dict()
        for folder in (base, *(job.folder.checkpoints / f"step-{step:08d}" / "model" for step in (2, 4)))
    )
    changed = {name for name, value in probed.items() if not torch.equal(value, start[name])}
    assert changed == {"visual.proj", "text_projection", "logit_scale"}
    assert {name for name, value in trained.items() if not torch.equal(value, probed[name])} >= {
        "visual.conv1.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    }
