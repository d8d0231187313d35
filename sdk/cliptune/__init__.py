"""cliptune: fine-tune CLIP for your domain, watch it learn, serve it.

This is the light client of a cliptune daemon: `Client` and `AsyncClient`, what they return, and every error
that they raise. What is not named here is not public.

A name is imported when it is first used (PEP 562): `import cliptune` costs nothing, and the daemon, its
engine and the trainer, which use single modules of this package, do not pay for a client.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cliptune.aio import AsyncClient
    from cliptune.client import Client
    from cliptune.codec import (
        cancel,
        checkpoint,
        evaluate,
        pause,
        resume,
        set_learning_rate,
        yield_to_inference,
    )
    from cliptune.dataset import Dataset, DatasetList, DatasetPreview, SampleRow
    from cliptune.errors import (
        AdapterBaseError,
        CancelledError,
        CliptuneError,
        ConflictError,
        ContextLengthError,
        DataError,
        DatasetNotFoundError,
        DeadlineExceededError,
        DiskFullError,
        HomeLockedError,
        ImageDecodeError,
        ImageSizeError,
        InternalError,
        InvalidInputError,
        JobNotFoundError,
        JobStateError,
        MissingColumnError,
        ModelDamagedError,
        ModelNotFoundError,
        ModelStateError,
        NotFoundError,
        OverloadedError,
        PathOutsideRootsError,
        RequestTooLargeError,
        SpecError,
        TensorError,
        TextError,
        UnauthenticatedError,
        UnavailableError,
        WeightsUnavailableError,
    )
    from cliptune.evaluation import ClassResult, Evaluation
    from cliptune.guard import GeneralResult, GuardCurve, GuardPoint
    from cliptune.interval import Interval
    from cliptune.job import (
        CheckpointSaved,
        CommandDone,
        CommandReceipt,
        Decision,
        Job,
        JobEvent,
        JobPlan,
        JobState,
        LogLine,
        ModelPublished,
        Notice,
        Progress,
        StateChange,
        UnknownBody,
    )
    from cliptune.model import Model, ProvenSize
    from cliptune.report import JobReport
    from cliptune.results import (
        Classification,
        Classifications,
        Embedded,
        Embeddings,
        FailedItem,
        Health,
        PairScores,
        Profile,
        Similarity,
    )
    from cliptune.session import Session
    from cliptune.session_aio import AsyncSession
    from cliptune.spec import load_spec, spec_from_mapping, spec_to_mapping, validate_shape
    from cliptune.study import TrialDone
    from cliptune.sweep import ResolutionSweep, SizeResult
    from cliptune.v1.spec_pb2 import JobSpec

__version__ = "0.1.0"

__all__ = [
    "AdapterBaseError",
    "AsyncClient",
    "AsyncSession",
    "CancelledError",
    "CheckpointSaved",
    "ClassResult",
    "Classification",
    "Classifications",
    "Client",
    "CliptuneError",
    "CommandDone",
    "CommandReceipt",
    "ConflictError",
    "ContextLengthError",
    "DataError",
    "Dataset",
    "DatasetList",
    "DatasetNotFoundError",
    "DatasetPreview",
    "DeadlineExceededError",
    "Decision",
    "DiskFullError",
    "Embedded",
    "Embeddings",
    "Evaluation",
    "FailedItem",
    "GeneralResult",
    "GuardCurve",
    "GuardPoint",
    "Health",
    "HomeLockedError",
    "ImageDecodeError",
    "ImageSizeError",
    "InternalError",
    "Interval",
    "InvalidInputError",
    "Job",
    "JobEvent",
    "JobNotFoundError",
    "JobPlan",
    "JobReport",
    "JobSpec",
    "JobState",
    "JobStateError",
    "LogLine",
    "MissingColumnError",
    "Model",
    "ModelDamagedError",
    "ModelNotFoundError",
    "ModelPublished",
    "ModelStateError",
    "NotFoundError",
    "Notice",
    "OverloadedError",
    "PairScores",
    "PathOutsideRootsError",
    "Profile",
    "Progress",
    "ProvenSize",
    "RequestTooLargeError",
    "ResolutionSweep",
    "SampleRow",
    "Session",
    "Similarity",
    "SizeResult",
    "SpecError",
    "StateChange",
    "TensorError",
    "TextError",
    "TrialDone",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownBody",
    "WeightsUnavailableError",
    "__version__",
    "cancel",
    "checkpoint",
    "evaluate",
    "load_spec",
    "pause",
    "resume",
    "set_learning_rate",
    "spec_from_mapping",
    "spec_to_mapping",
    "validate_shape",
    "yield_to_inference",
]

# The same as the imports above, for Python; a test holds the two together.
_NAMES: Final = {
    "aio": ("AsyncClient",),
    "client": ("Client",),
    "codec": (
        "cancel",
        "checkpoint",
        "evaluate",
        "pause",
        "resume",
        "set_learning_rate",
        "yield_to_inference",
    ),
    "dataset": (
        "Dataset",
        "DatasetList",
        "DatasetPreview",
        "SampleRow",
    ),
    "errors": (
        "AdapterBaseError",
        "CancelledError",
        "CliptuneError",
        "ConflictError",
        "ContextLengthError",
        "DataError",
        "DatasetNotFoundError",
        "DeadlineExceededError",
        "DiskFullError",
        "HomeLockedError",
        "ImageDecodeError",
        "ImageSizeError",
        "InternalError",
        "InvalidInputError",
        "JobNotFoundError",
        "JobStateError",
        "MissingColumnError",
        "ModelDamagedError",
        "ModelNotFoundError",
        "ModelStateError",
        "NotFoundError",
        "OverloadedError",
        "PathOutsideRootsError",
        "RequestTooLargeError",
        "SpecError",
        "TensorError",
        "TextError",
        "UnauthenticatedError",
        "UnavailableError",
        "WeightsUnavailableError",
    ),
    "evaluation": (
        "ClassResult",
        "Evaluation",
    ),
    "guard": (
        "GeneralResult",
        "GuardCurve",
        "GuardPoint",
    ),
    "interval": ("Interval",),
    "job": (
        "CheckpointSaved",
        "CommandDone",
        "CommandReceipt",
        "Decision",
        "Job",
        "JobEvent",
        "JobPlan",
        "JobState",
        "LogLine",
        "ModelPublished",
        "Notice",
        "Progress",
        "StateChange",
        "UnknownBody",
    ),
    "model": (
        "Model",
        "ProvenSize",
    ),
    "report": ("JobReport",),
    "results": (
        "Classification",
        "Classifications",
        "Embedded",
        "Embeddings",
        "FailedItem",
        "Health",
        "PairScores",
        "Profile",
        "Similarity",
    ),
    "session": ("Session",),
    "session_aio": ("AsyncSession",),
    "spec": (
        "load_spec",
        "spec_from_mapping",
        "spec_to_mapping",
        "validate_shape",
    ),
    "sweep": (
        "ResolutionSweep",
        "SizeResult",
    ),
    "study": ("TrialDone",),
    "v1.spec_pb2": ("JobSpec",),
}
_MODULE_OF: Final = {name: module for module, names in _NAMES.items() for name in names}

# Unseen by type checkers, to which it would say that any name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted(__all__)
