"""Attention in blocks gives what torch's own gives: a call, whole models, recomputed, in inference."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cliptune.errors import InvalidInputError
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.attention import (
    AttentionPlan,
    block_shape,
    exact,
    image_tokens,
    install,
    installed,
    uninstall,
)
from cliptune_model.attention.exact import attention
from cliptune_model.attention.plan import bytes_a_score
from cliptune_model.clip import Clip, build
from cliptune_model.exported import export_model, load_exported, manifest_of
from cliptune_model.similarity import Cosine
from cliptune_model.source import ModelSource

MODES = ("sliced", "chunked")
B, H, Q, K, D = 3, 4, 37, 29, 16
# Some queries of one head; some heads; everything at once.
BUDGETS = (3_000, 30_000, 1 << 30)
TINY = 4_000

TEXT = {"context_length": 16, "vocab_size": 500, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TIMM = {"image_size": 160, "timm_proj": "linear"}


def openai_clip() -> nn.Module:
    return CLIP(32, VISION, TEXT)


def resnet() -> nn.Module:
    vision = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "patch_size": None}
    return CLIP(32, vision, TEXT)


def own_attention() -> nn.Module:
    return CLIP(32, {**VISION, "qk_norm": True}, {**TEXT, "qk_norm": True})


def timm_vit() -> nn.Module:
    return CustomTextCLIP(32, {**TIMM, "timm_model_name": "test_vit", "timm_pool": ""}, TEXT)


def siglip() -> nn.Module:
    vision = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    text = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    return CustomTextCLIP(96, vision, text, init_logit_bias=-10.0)


def coca() -> nn.Module:
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    decoder = {"width": 32, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 500}
    return CoCa(32, decoder, text, vision)


FAMILIES = (openai_clip, own_attention, resnet, timm_vit, siglip, coca)


def made(family: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = family()
        # At their initial values attention is nearly uniform, and a wrong gradient of it nearly invisible.
        for name, weight in model.named_parameters():
            if "in_proj_weight" in name or "qkv.weight" in name:
                weight.data.mul_(3)
    return model


def inputs(model: Any) -> tuple[Tensor, Tensor]:
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, height, width, generator=generator)
    tokens = torch.randint(1, 400, (3, TEXT["context_length"]), generator=generator)
    tokens[0, 9:] = 0
    return images, tokens


def features(model: Any) -> tuple[Tensor, Tensor]:
    images, tokens = inputs(model)
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def loss_of(model: Any) -> Tensor:
    image, text = features(model)
    return (image @ text.T * 10).logsumexp(dim=1).sum() + image[:, 0].sum()


def gradient(model: nn.Module, backward: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
    model.zero_grad()
    backward(loss_of(model))
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def plan_for(model: Any, mode: str) -> AttentionPlan:
    """Several blocks of each attention, but not hundreds."""
    large = inputs(model)[0].shape[-1] > 100
    return AttentionPlan(mode=mode, budget_bytes=200_000 if large else TINY)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


class Operators(TorchDispatchMode):
    """Names of the operators that run inside, on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> set[str]:
        """torch's own attention."""
        return {name for name in self.names if "attention" in name}


class Keys(TorchFunctionMode):
    """How many keys each attention sees."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.lengths.append(args[1].shape[-2])
        elif func is F.multi_head_attention_forward:
            self.lengths.append(args[1].shape[0])
        return func(*args, **(kwargs or {}))


def tensors(dtype: torch.dtype = torch.float64, queries: int = Q) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((B, H, queries, D), (B, H, K, D), (B, H, K, D))
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def masks(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    shown = torch.rand(B, 1, Q, K, generator=generator) > 0.4
    shown[..., 0] = True
    hidden = torch.full((Q, K), -math.inf, dtype=dtype).triu_(1)
    nothing = torch.ones(Q, K, dtype=torch.bool).tril_(-1)
    bias = torch.randn(H, Q, K, dtype=dtype, generator=generator)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "float triangle": {"attn_mask": hidden},
        "float of each head": {"attn_mask": bias},
        "bool of each sample": {"attn_mask": shown},
        "bool of keys": {"attn_mask": shown[:, :, :1]},
        "rows that see nothing": {"attn_mask": nothing},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", masks(torch.float64))
def test_one_call_equals_torchs_own_forward_and_backward(mode: str, kind: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        leaves, options = tensors(dtype), masks(dtype)[kind]
        weight = torch.randn(B, H, Q, D, dtype=dtype, generator=torch.Generator().manual_seed(4))
        out = F.scaled_dot_product_attention(*leaves, **options)
        expected = (out, *torch.autograd.grad(out, leaves, weight))
        for budget in BUDGETS:
            out = attention(AttentionPlan(mode=mode, budget_bytes=budget), *leaves, **options)
            found = (out, *torch.autograd.grad(out, leaves, weight))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(
                    ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max())
                )


def test_one_query_at_a_time_is_exact_too() -> None:
    leaves = tensors()
    plan = AttentionPlan(mode="chunked", budget_bytes=1)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).square().sum(), leaves)
    found = torch.autograd.grad(attention(plan, *leaves).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(Q, K), (1, K), (H, Q, K), (B, 1, 1, K), (B, H, Q, K)], ids=str)
def test_a_learned_mask_gets_its_gradient(shape: tuple[int, ...]) -> None:
    leaves = [*tensors(), torch.randn(shape, dtype=torch.float64, requires_grad=True)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).square().sum(), leaves)
    for mode, budget in itertools.product(MODES, BUDGETS):
        out = attention(AttentionPlan(mode=mode, budget_bytes=budget), *leaves)
        for ours, theirs in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_shapes_alone_go_through_without_memory() -> None:
    q, k, v = (tensor.detach().to("meta").requires_grad_() for tensor in tensors())
    out = attention(AttentionPlan(mode="sliced", budget_bytes=TINY), q, k, v)
    out.sum().backward()
    assert out.shape == (B, H, Q, D)
    assert q.grad is not None
    assert q.grad.shape == q.shape


def test_samples_without_a_head_dimension_are_taken_too() -> None:
    q, k, v = (tensor.detach()[:, 0] for tensor in tensors())
    mask = torch.randn(B, Q, K, dtype=torch.float64)
    ours = attention(AttentionPlan(mode="chunked", budget_bytes=TINY), q, k, v, mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_the_backward_pass_is_that_of_the_forward_pass(mode: str) -> None:
    plan = AttentionPlan(mode=mode, budget_bytes=100)
    leaves = [tensor[:1, :2, :5, :3].detach().requires_grad_() for tensor in tensors()]

    def dropped(*qkv: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attention(plan, *qkv, dropout_p=0.3)

    with torch.random.fork_rng(devices=[]):
        assert torch.autograd.gradcheck(dropped, leaves)
        assert not torch.equal(dropped(*leaves), attention(plan, *leaves, dropout_p=0.3))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    q, k = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 500, 4)
    v = torch.ones(1, 1, 500, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        plan = AttentionPlan(mode="chunked", budget_bytes=400_000)
        out = attention(plan, q, k, v, dropout_p=0.25)
        assert attention(plan, q, k, v, dropout_p=1.0).abs().max() == 0
    assert abs(float(out.mean()) - 1) < 0.01
    assert abs(float(out.var()) - 0.25 / 0.75 / 500) < 2e-4


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_it_is_as_near_to_the_truth_as_torchs_own(half: torch.dtype) -> None:
    leaves = tensors(torch.float32)
    weight = torch.randn(B, H, Q, D, generator=torch.Generator().manual_seed(4))
    truth = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, weight)

    def gradients(function: Callable[..., Tensor]) -> list[float]:
        with torch.autocast("cpu", dtype=half):
            out = function(*leaves)
        assert out.dtype == half
        found = torch.autograd.grad(out, leaves, weight.to(half))
        return [difference(ours, true) for ours, true in zip(found, truth, strict=True)]

    theirs = gradients(F.scaled_dot_product_attention)
    for mode in MODES:
        plan = AttentionPlan(mode=mode, budget_bytes=20_000)
        ours = gradients(lambda *qkv, plan=plan: attention(plan, *qkv))
        assert all(our <= 1.5 * their for our, their in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_whole_models_equal_torchs_own(family: Callable[[], nn.Module], mode: str) -> None:
    model = made(family).train()
    expected = gradient(model)
    install(model, plan_for(model, mode))
    with Operators() as ran:
        found = gradient(model)
    assert not ran.fused
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_equals_torchs_own_and_takes_no_way_around_the_blocks(
    family: Callable[[], nn.Module],
) -> None:
    model = made(family).eval()
    for context in (torch.inference_mode, torch.no_grad):
        with context(), Operators() as ran:
            expected = features(model)
        assert ran.fused
        install(model, plan_for(model, "chunked"))
        with context(), Operators() as ran:
            found = features(model)
        assert not ran.fused
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        uninstall(model)


def on_another_thread(loss: Tensor) -> None:
    """As CUDA runs it; the operators of a checkpoint's recomputation are those of that thread."""
    ran, failed = Operators(), []

    def backward() -> None:
        try:
            with ran:
                loss.backward()
        except Exception as error:  # told by the assertion below
            failed.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failed
    assert ran.names
    assert not ran.fused


@pytest.mark.parametrize("family", [openai_clip, resnet, timm_vit, siglip, coca])
def test_a_checkpoint_recomputes_in_blocks_on_whatever_thread(family: Callable[[], nn.Module]) -> None:
    model = made(family).train()
    expected = gradient(model)
    model.set_grad_checkpointing(True)
    install(model, plan_for(model, "sliced"))
    assert difference(gradient(model, on_another_thread), expected) <= 1e-5


def test_lean_towers_follow_the_plan_too() -> None:
    clip = build(ModelSource(name="cliptune-test-vit"), seed=3)
    clip.model.train()
    images = torch.randn(2, 3, *clip.image_size, generator=torch.Generator().manual_seed(1))
    tokens = clip.tokenize(["a cell", "a crack in a cell"])

    def loss_gradient() -> Tensor:
        clip.model.zero_grad()
        (clip.encode_images(images) * clip.encode_texts(tokens)).sum().backward()
        return torch.cat(
            [weight.grad.flatten() for weight in clip.model.parameters() if weight.grad is not None]
        )

    expected = loss_gradient()
    make_lean(clip, choose_lean(clip))
    install(clip.model, AttentionPlan(mode="chunked", budget_bytes=TINY))
    with Operators() as ran:
        found = loss_gradient()
    assert not ran.fused
    assert difference(found, expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at each
def test_compiled_blocks_follow_the_plan_whole_and_a_new_plan_too() -> None:
    model = made(openai_clip).train()
    expected = gradient(model)
    plans = [AttentionPlan(mode="chunked", budget_bytes=TINY), AttentionPlan(mode="sdpa")]
    counters.clear()
    for block in model.visual.transformer.resblocks:
        block.compile(backend="eager", dynamic=False, fullgraph=True)
    for number, plan in enumerate(plans, start=1):
        install(model, plan)
        assert difference(gradient(model), expected) <= 1e-5
        assert counters["stats"]["unique_graphs"] == number


def test_models_of_one_process_follow_plans_of_their_own() -> None:
    blocked, plain = made(openai_clip).train(), made(openai_clip).train()
    install(blocked, AttentionPlan(mode="sliced", budget_bytes=TINY))
    install(plain, AttentionPlan(mode="sdpa"))
    with Operators() as of_blocked:
        loss = loss_of(blocked)
    with Operators() as of_plain:
        loss_of(plain)
    with Operators() as of_backward:
        loss.backward()
    assert of_plain.fused
    assert not of_blocked.fused
    assert not of_backward.fused
    assert installed(plain).mode == "sdpa"


def test_a_plan_is_replaced_and_taken_out_again_and_leaves_no_trace() -> None:
    model = made(openai_clip)
    kinds = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    for mode in ("sliced", "sliced", "chunked"):
        plan = AttentionPlan(mode=mode, budget_bytes=TINY)
        install(model, plan)
        assert installed(model) == plan
    assert isinstance(model.transformer.resblocks[0].attn, nn.MultiheadAttention)
    assert list(model.state_dict()) == keys
    install(model, AttentionPlan(mode="sdpa"))
    assert [type(module) for module in model.modules()] == kinds


def test_copies_and_pickles_keep_the_plan_and_stand_alone() -> None:
    model = made(openai_clip).eval()
    plan = AttentionPlan(mode="chunked", budget_bytes=TINY)
    install(model, plan)
    expected = features(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert installed(other) == plan
        for weight in model.parameters():
            weight.data.add_(0)
        torch.testing.assert_close(features(other), expected)
        uninstall(other)
        assert installed(model) == plan


def test_what_blocks_cannot_do_is_left_to_torch_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    exact._tell_once.cache_clear()
    plan = AttentionPlan(mode="sliced", budget_bytes=TINY)
    q, k, v = (tensor.detach() for tensor in tensors())
    for _ in range(2):
        grouped = attention(plan, q, k[:, :2], v[:, :2], enable_gqa=True)
    assert [record.args for record in caplog.records] == [("grouped queries",)]
    torch.testing.assert_close(
        grouped, F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    )
    module = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 5:] = True
    asked: tuple[dict[str, Any], ...] = (
        {"need_weights": True},
        {"need_weights": False, "key_padding_mask": padding},
        {"need_weights": False, "attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1)},
        {"need_weights": False, "attn_mask": torch.randn(8, 9, 9)},
    )
    for options in asked:
        uninstall(module)
        expected = module(x, x, x, **options)
        install(module, plan)
        found = module(x, x, x, **options)
        torch.testing.assert_close(found, expected)


def test_an_engines_model_answers_the_same_in_blocks(tmp_path: Any, clip: Clip) -> None:
    export_model(clip, tmp_path / "model", manifest_of(clip))
    served = load_exported(tmp_path / "model")
    images, tokens = torch.rand(2, 3, *served.image_size), served.tokenize_trimmed(["a cell", "a crack"])
    with torch.inference_mode():
        expected = served.encode_images(images), served.encode_texts(tokens)
        install(served.model, AttentionPlan(mode="sliced", budget_bytes=TINY))
        with Operators() as ran:
            found = served.encode_images(images), served.encode_texts(tokens)
    assert not ran.fused
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_blocks_keep_to_the_budget_are_even_and_cover_everything(mode: str, dtype: torch.dtype) -> None:
    for samples, heads, tokens in itertools.product((1, 7, 64), (1, 12, 16), (17, 77, 577, 5330)):
        for budget in (1 << 16, 1 << 22, 1 << 28):
            plan = AttentionPlan(mode=mode, budget_bytes=budget)
            shape = block_shape(plan, samples=samples, heads=heads, queries=tokens, keys=tokens, dtype=dtype)
            assert 1 <= shape.samples <= samples
            assert 1 <= shape.heads <= heads
            assert 1 <= shape.queries <= tokens
            assert shape.heads == heads or shape.samples == 1
            size = shape.samples * shape.heads * shape.queries * tokens * bytes_a_score(dtype)
            least = tokens if mode == "sliced" else 1
            assert size <= max(budget, least * tokens * bytes_a_score(dtype))
            parts = -(-tokens // shape.queries)
            assert parts * shape.queries - tokens < parts  # even: the last block lacks less than one row each


def test_a_wrong_plan_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="flash"):
        AttentionPlan(mode="flash")
    with pytest.raises(InvalidInputError, match="0 bytes"):
        AttentionPlan(mode="sliced", budget_bytes=0)


def test_5330_tokens_attend_exactly() -> None:
    tower = open_clip.model._build_vision_tower(
        16, open_clip.CLIPVisionCfg(image_size=1022, patch_size=14, layers=1, width=32, head_width=32)
    )
    image = torch.rand(1, 3, 1022, 1022)

    def pixels_gradient() -> Tensor:
        tower.zero_grad()
        tower(image).square().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in tower.parameters()])

    expected = pixels_gradient()
    install(tower, AttentionPlan(mode="chunked", budget_bytes=32 << 20))
    assert difference(pixels_gradient(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("family", "tokens"),
    [(openai_clip, 17), (own_attention, 17), (resnet, 5), (timm_vit, 101), (siglip, 101), (coca, 17)],
)
def test_an_images_tokens_are_those_that_attention_sees(family: Callable[[], nn.Module], tokens: int) -> None:
    model = made(family)
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    with torch.no_grad(), Keys() as attended:
        model.train().encode_image(torch.zeros(2, 3, height, width))
    clip = Clip(
        model=model,
        model_config={},
        preprocess_config={},
        architecture="custom",
        context_length=16,
        embedding_dim=32,
        image_size=(height, width),
        pretrained=False,
        transform=lambda _: torch.zeros(0),
        tokenizer=lambda _: torch.zeros(0),
        similarity=Cosine(32),
    )
    assert image_tokens(clip) == tokens
    assert max(attended.lengths) == tokens
