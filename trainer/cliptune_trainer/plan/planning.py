"""How the job's step is computed: device policy, batch plan and loss, from one place for preparation and run.

Enters: the spec, the device, the model, the data. Leaves: an `Execution`, each automatic choice with its
reason. Called by preparation, which shows it, and by `run`, which acts on it after a few probes of the
device.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from cliptune.errors import CliptuneError, InvalidInputError, OverloadedError
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.attention import AttentionPlan, image_tokens
from cliptune_model.choice import Choice
from cliptune_model.clip import Clip
from cliptune_model.machine.device import free_memory_bytes
from cliptune_model.machine.policy import Policy, Wishes
from cliptune_model.machine.policy import decide as decide_policy
from cliptune_model.machine.workload import Workload
from cliptune_model.towers.trimming import choose_trimming
from cliptune_trainer.data.dataset import Dataset
from cliptune_trainer.losses.entry import BIAS, TEACHER
from cliptune_trainer.losses.sizing import choose_objective_tiling, objective_bytes
from cliptune_trainer.memory.cache import CachedPlan, PlanCache
from cliptune_trainer.memory.estimate import OVERHEAD, Estimate, Estimator
from cliptune_trainer.memory.limit import limit_process
from cliptune_trainer.memory.plan import BatchPlan, Demand, DoesNotFitError, Way, settle, ways
from cliptune_trainer.memory.probe import DeviceProbe, search
from cliptune_trainer.memory.refusal import does_not_fit
from cliptune_trainer.plan.decide import Decisions, Hardware
from cliptune_trainer.plan.earlier import of_cache, of_checkpoint
from cliptune_trainer.plan.execution import Execution
from cliptune_trainer.spec import Spec
from cliptune_trainer.steps.checkpointing import enable_checkpointing
from cliptune_trainer.steps.half_weights import choose_half_weights
from cliptune_trainer.steps.logit_bias import ensure_bias
from cliptune_trainer.steps.precision import Precision

# Below this share of the budget, by the rough count, nothing needs to be counted or probed.
_FAR_BELOW: Final = 0.5
# A rough count errs by a few percent for transformers that it knows, and by much more for others.
_ROUGH_MARGIN: Final = 1.3
_GUESSED_MARGIN: Final = 16.0
# Below this share of the budget, by the exact count, the device need not be asked.
_SURELY: Final = 0.6
# Of the budget beside weights and optimizer state, for the logits of the whole batch.
_LOSS_SHARE: Final = 0.25
# Features of both towers, their gradients and unit forms, fp32.
_FEATURE_COPIES: Final = 8
_FP32_BYTES: Final = 4
_LONGEST_CAPTIONS: Final = 64
# Of the device: what would fit into this much is not refused for good when others hold memory now.
_OURS_SHARE: Final = 0.8
_BUDGET_STEP_BYTES: Final = 256 << 20
_BLOCKED_MODES: Final = ("sliced", "chunked")
# One head's scores of one image, from which on blocks of queries are taken.
_CHUNKED_TOKENS: Final = 1024


class Planner:
    """Plans one job.

    Args:
        spec: the job.
        hardware: its device.
        clip: the model, as it was built. Its towers are made lean, and it gets the bias that the loss needs.
        cache: plans of before.
        batch_size: pairs in the effective batch.
        total_steps: of the run.
        captions: the training texts, for their length.
        on_device: the model is on its device, which may be asked; otherwise the device is left alone.
    """

    def __init__(
        self,
        spec: Spec,
        hardware: Hardware,
        clip: Clip,
        cache: PlanCache,
        *,
        batch_size: int,
        total_steps: int,
        captions: Iterable[str],
        on_device: bool,
    ) -> None:
        self._spec, self._hardware, self._clip, self._cache = spec, hardware, clip, cache
        self._on_device = on_device
        self._device = hardware.device.value
        self._kind = self._device.partition(":")[0]
        self._batch_size = batch_size
        self._lean = _lean(clip, self._kind)
        make_lean(clip, self._lean)
        self._bias = [ensure_bias(clip)] if BIAS in spec.loss.needs else []
        self._text_tokens = longest_text(clip, captions)
        self._workload = replace(
            Workload.of(
                clip,
                batch_size=batch_size,
                image_tokens=image_tokens(clip),
                total_steps=total_steps,
            ),
            text_tokens=self._text_tokens,
        )

    @classmethod
    def of_job(
        cls,
        spec: Spec,
        hardware: Hardware,
        clip: Clip,
        home: Path | None,
        decisions: Decisions,
        dataset: Dataset,
        *,
        on_device: bool,
    ) -> Self:
        """For a job's data, with the plans that are kept in `home`, if it has one."""
        return cls(
            spec,
            hardware,
            clip,
            PlanCache(home),
            batch_size=decisions.batch_size,
            total_steps=decisions.total_steps,
            captions=(pair.caption for pair in dataset.train.pairs),
            on_device=on_device,
        )

    def plan(self, stored: Mapping[str, Any] | None = None) -> Execution:
        """The execution; that of a checkpoint if there is one.

        Raises:
            InvalidInputError: the device lacks the precision, or the model does not fit.
            OverloadedError: it would fit, but others hold the device's memory now.
        """
        policy = self._policy(stored)
        tiling = self._tiling(policy, stored)
        plan = of_checkpoint(stored, policy.budget_bytes) if stored else self._batch_plan(policy, tiling)
        budget = policy.memory_budget
        budget = replace(budget, value=f"{int(budget.value) / 2**30:.1f} GiB")
        return Execution(
            policy=policy,
            plan=plan,
            tiling=tiling,
            lean=self._lean,
            text_tokens=self._text_tokens,
            precision=policy.precision.value,
            choices=(
                policy.precision,
                budget,
                *(_with_reason(choice, policy.attention) for choice in plan.choices),
                tiling,
                *self._bias,
                policy.compile,
                self._lean,
                choose_half_weights(self._clip, policy.precision.value, self._kind),
                choose_trimming(self._clip.model, self._clip.context_length),
                policy.fused_optimizer,
            ),
        )

    def _policy(self, stored: Mapping[str, Any] | None) -> Policy:
        train, resources = self._spec.train, self._spec.resources
        wishes = Wishes(
            precision=train.precision if stored is None else stored["precision"],
            attention=train.attention,
            checkpointing=train.checkpointing,
            micro_batch_size=train.micro_batch_size,
            compile=train.compile,
            threads=resources.threads,
            memory_bytes=None if resources.memory_bytes is None else min(resources.memory_bytes, self._whole),
        )
        free = None
        if self._on_device and resources.memory_bytes is None:
            held = sum(weight.nbytes for weight in self._clip.model.parameters())
            free = free_memory_bytes(self._device) + held
        return decide_policy(
            self._hardware.machine,
            self._hardware.device,
            wishes,
            self._workload,
            self._hardware.proofs,
            free_bytes=free,
        )

    def _tiling(self, policy: Policy, stored: Mapping[str, Any] | None) -> Choice:
        if stored is not None:
            return Choice(subject="loss tiling", value=stored["tiling"], reason="as before")
        room = max(policy.budget_bytes - self._workload.state_bytes(), 0)
        return choose_objective_tiling(
            self._spec.loss,
            self._clip.similarity,
            self._batch_size,
            self._clip.embedding_dim,
            self._device,
            int(room * _LOSS_SHARE),
        )

    def _demand(self, policy: Policy, tiling: Choice) -> Demand:
        train, count = self._spec.train, self._batch_size
        dim = self._clip.embedding_dim
        features = _FEATURE_COPIES * _FP32_BYTES * count * dim
        mode = policy.attention.value
        modes = [mode]
        if train.attention == "auto" and self._kind == "mps" and mode == "sdpa":
            modes.append("chunked" if self._workload.tokens >= _CHUNKED_TOKENS else "sliced")
        modes = [mode for mode in modes if mode in policy.attentions] or [mode]
        switches = {"on": (True,), "off": (False,)}.get(train.checkpointing, (False, True))
        if not policy.may_recompute:  # doctor found it broken
            switches = (False,)
        wanted = train.micro_batch_size
        return Demand(
            batch_size=count,
            budget_bytes=policy.budget_bytes,
            device_type=self._kind,
            tokens=self._workload.image_tokens + self._workload.text_tokens,
            loss_bytes=self._loss_bytes(tiling) + features,
            attentions=tuple(AttentionPlan(mode=mode, budget_bytes=policy.block_bytes) for mode in modes),
            checkpointing=switches,
            micro_batch_size=None if wanted is None else min(wanted, count, policy.max_pairs or count),
            max_micro_batch=policy.max_pairs,
        )

    def _loss_bytes(self, tiling: Choice) -> int:
        """The objective's tables, and the weights of the model that it is held to, if any."""
        size = objective_bytes(
            self._spec.loss, self._clip.similarity, self._batch_size, self._clip.embedding_dim, tiling
        )
        if TEACHER in self._spec.loss.needs:
            size += sum(weight.nbytes for weight in self._clip.model.parameters())
        return size

    def _batch_plan(self, policy: Policy, tiling: Choice) -> BatchPlan:
        demand = self._demand(policy, tiling)
        if (way := self._obvious(policy, demand)) is not None:
            return settle(demand, way, [way], source="estimated")
        question = self._question(policy, demand)
        if (cached := self._cache.get(question)) is not None and (cached.probed or not self._may_probe):
            return of_cache(demand, cached)
        estimator = Estimator(
            self._clip,
            device_type=self._kind,
            precision=policy.precision.value,
            text_tokens=self._text_tokens,
            workload=self._workload,
            recompute=enable_checkpointing,
        )
        try:
            found = ways(demand, lambda attention, on: estimator(attention, checkpointing=on))
        except DoesNotFitError as error:
            raise self._refusal(policy, demand, error.smallest) from error
        best, source = found[0], "estimated"
        if self._may_probe and not self._surely_fits(demand, best):
            limit_process(self._clip.device, demand.budget_bytes)
            precision = Precision(policy.precision.value, self._clip.device)
            probe = DeviceProbe(
                self._clip,
                precision,
                text_tokens=self._text_tokens,
                extra_bytes=demand.loss_bytes,
            )
            probed = search(demand, found, probe)
            if probed is None:
                raise self._refusal(policy, demand, found[-1])
            best, source = probed.way, "probed"
        self._cache.put(
            question,
            CachedPlan(
                micro_batch_size=best.micro_batch_size,
                checkpointing=best.checkpointing,
                attention=best.attention.mode,
                block_bytes=best.attention.budget_bytes,
                estimated_bytes=best.peak_bytes,
                probed=source == "probed" or not self._may_probe or self._surely_fits(demand, best),
            ),
        )
        return settle(demand, best, found, source=source)

    @property
    def _whole(self) -> int:
        """Bytes of the device, whoever holds them."""
        machine = self._hardware.machine
        return machine.memory_bytes if self._kind == "cpu" else machine.gpu_memory_bytes

    @property
    def _may_probe(self) -> bool:
        """On the CPU there is no telling what a step took."""
        return self._on_device and self._kind != "cpu"

    @staticmethod
    def _surely_fits(demand: Demand, way: Way) -> bool:
        whole = way.micro_batch_size == demand.batch_size or demand.micro_batch_size is not None
        return whole and not way.checkpointing and way.peak_bytes <= _SURELY * demand.budget_bytes

    def _obvious(self, policy: Policy, demand: Demand) -> Way | None:
        """Everything at once as the user or the policy says, where that is far below the budget anyway."""
        known = self._workload.image.layers and self._workload.text.layers
        attention, recomputed = demand.attentions[0], demand.checkpointing[0]
        pair = self._workload.pair_bytes(
            policy.precision.value,
            checkpointing=recomputed,
            scores_kept=attention.mode == "sdpa" and self._kind == "mps",
        )
        margin = (_ROUGH_MARGIN if known else _GUESSED_MARGIN) * OVERHEAD[self._kind]
        blocks = attention.budget_bytes if attention.mode in _BLOCKED_MODES else 0
        rough = Estimate(
            fixed_bytes=self._workload.state_bytes() + demand.loss_bytes + min(blocks, pair * demand.most),
            pair_bytes=int(pair * margin),
        )
        if rough.at(demand.most) > _FAR_BELOW * demand.budget_bytes:
            return None
        return Way(
            attention=attention,
            checkpointing=recomputed,
            estimate=rough,
            micro_batch_size=demand.most,
            cost=0.0,
        )

    def _refusal(self, policy: Policy, demand: Demand, smallest: Way) -> CliptuneError:
        told = does_not_fit(self._clip, self._workload, demand, smallest, precision=policy.precision.value)
        if self._spec.resources.memory_bytes is None and smallest.peak_bytes < self._whole * _OURS_SHARE:
            return OverloadedError(f"{told} Others hold memory of {self._device} now.")
        return InvalidInputError(told)

    def _question(self, policy: Policy, demand: Demand) -> dict[str, Any]:
        machine = self._hardware.machine
        clip, train = self._clip, self._spec.train
        return {
            "model": json.dumps(clip.model_config, sort_keys=True, default=str),
            "lean": self._lean.value,
            "image_size": list(clip.image_size),
            "workload": asdict(self._workload),
            "trained": [str(self._spec.adapter), train.freeze_image, train.freeze_text],
            "loss": [*self._spec.loss.names, demand.loss_bytes],
            "precision": policy.precision.value,
            "device": [self._kind, machine.gpu_name or machine.chip, machine.gpu_memory_bytes],
            "budget": demand.budget_bytes // _BUDGET_STEP_BYTES,
            "attentions": [asdict(plan) for plan in demand.attentions],
            "checkpointing": list(demand.checkpointing),
            "micro_batch": [demand.micro_batch_size, demand.max_micro_batch],
            "versions": [machine.torch_version, version("open_clip_torch"), _own_version()],
        }


def _lean(clip: Clip, kind: str) -> Choice:
    """By the device of the run, not by the one that preparation is on."""
    if kind == "mps" and clip.device.type != "mps":
        return Choice(subject="lean_towers", value="off", reason="proved on CPU and CUDA alone")
    return choose_lean(clip)


def longest_text(clip: Clip, captions: Iterable[str]) -> int:
    """Tokens of the longest texts, as the towers will see them."""
    longest = heapq.nlargest(_LONGEST_CAPTIONS, set(captions), key=len)
    return int(clip.tokenize_trimmed(longest).shape[1]) if longest else clip.context_length


def _own_version() -> str:
    return version("cliptune")


def _with_reason(choice: Choice, of_policy: Choice) -> Choice:
    """The policy's own choice, with its reason, where the batch plan left it as it was."""
    return of_policy if (choice.subject, choice.value) == (of_policy.subject, of_policy.value) else choice
