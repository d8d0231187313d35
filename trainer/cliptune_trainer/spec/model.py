"""The model that training starts from: the spec's `[model]`, typed and checked."""

from __future__ import annotations

from cliptune.v1 import spec_pb2
from cliptune_model.source import MAX_CONTEXT, ModelSource
from cliptune_trainer.spec.check import within, wrong


def model_source(message: spec_pb2.ModelSpec) -> ModelSource:
    """The source that a `ModelSpec` names. Raises `SpecError`."""
    if not message.name.strip():
        raise wrong(
            "model.name",
            "empty",
            "an open_clip architecture, hf-hub:ORG/REPO, local-dir:PATH, a configuration shipped with"
            " cliptune, or registry:NAME",
        )
    context_length = message.context_length if message.HasField("context_length") else None
    if context_length is not None:
        within("model.context_length", context_length, 1, MAX_CONTEXT)
    return ModelSource(
        name=message.name,
        pretrained=message.pretrained,
        context_length=context_length,
        patch_size=message.patch_size if message.HasField("patch_size") else None,
        similarity=message.similarity,
        similarity_parameters=dict(message.similarity_parameters),
    )
