"""Messages and vectors as JSON."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from google.protobuf import json_format

from cliptune.errors import InvalidInputError
from cliptune.tensors import pack
from cliptune.v1 import inference_pb2, job_pb2, model_pb2, spec_pb2, training_pb2
from cliptune_server.gateway import forms
from cliptune_server.gateway.messages import MESSAGES, json_form, schemas


def strict_json(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def test_a_message_says_numbers_as_numbers_and_leaves_out_only_what_is_not_set() -> None:
    job = job_pb2.Job(id="j", state=job_pb2.JOB_STATE_RUNNING, last_event_number=2**60)
    job.progress.loss = float("nan")
    job.progress.device_memory_bytes = 2**40
    job.created.FromSeconds(0)
    job.spec.train.epochs = 0
    job.evaluation.metrics["recall@1"] = 0.25
    form = json.loads(strict_json(json_form(job)))
    assert form["last_event_number"] == 2**60
    assert form["state"] == "JOB_STATE_RUNNING"
    assert form["created"] == "1970-01-01T00:00:00Z"
    assert form["progress"]["loss"] is None
    assert form["progress"]["device_memory_bytes"] == 2**40
    assert form["progress"]["step"] == 0
    texts = [field.name for field in spec_pb2.TrainSpec.DESCRIPTOR.fields if not field.has_presence]
    assert form["spec"]["train"] == {"epochs": 0} | dict.fromkeys(texts, "")
    assert form["evaluation"]["metrics"] == {"recall@1": 0.25}
    assert "finished" not in form


def test_the_json_form_is_read_back_by_protobufs_own_parser() -> None:
    event = job_pb2.JobEvent(job_id="j", number=7, attempt=2)
    event.plan.decisions.add(subject="device", choice="cpu", reason="there is no other")
    event.plan.total_steps = 2**40
    event.time.GetCurrentTime()
    read = json_format.ParseDict(json_form(event), job_pb2.JobEvent())
    assert read == event


@pytest.mark.parametrize(
    "message", [job_pb2.Job, job_pb2.JobEvent, training_pb2.ListJobsResponse, model_pb2.Model]
)
def test_an_empty_message_has_the_fields_that_its_schema_requires(message: type) -> None:
    name = message.DESCRIPTOR.name  # type: ignore[attr-defined]
    assert set(schemas(MESSAGES)[name]["required"]) == set(json_form(message()))


def test_floats_are_the_float32_of_the_grpc_answer_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    scales_N1 = 10.0 ** rng.integers(-30, 30, (50, 1))
    vectors_ND = (rng.standard_normal((50, 64)) * scales_N1).astype(np.float32)
    vectors_ND[0, :3] = (np.float32(1e-45), np.float32(3.4028235e38), np.float32(-0.0))
    for encoding in ("float", "base64"):
        read = json.loads(strict_json(forms.embedding_values(pack(vectors_ND), encoding)))
        if encoding == "base64":
            read = [np.frombuffer(base64.b64decode(row), "<f4") for row in read]
        assert np.array(read, np.float32).tobytes() == vectors_ND.tobytes()


def test_a_failed_item_is_null_and_its_neighbours_are_whole() -> None:
    scores_NC = np.array([[0.25, 0.75], [np.nan, np.nan], [1.0, np.nan]], np.float32)
    assert forms.float_rows(pack(scores_NC)) == [[0.25, 0.75], None, [1.0, None]]
    assert forms.embedding_values(pack(scores_NC), "float") == [[0.25, 0.75], None, None]
    assert forms.embedding_values(pack(scores_NC), "base64")[1:] == [None, None]
    answer = inference_pb2.ClassifyResponse(labels=["a", "b"], probabilities=pack(scores_NC))
    assert forms.predictions(answer) == [{"label": "b", "probability": 0.75}, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "aGVsbG8=",
        "data:image/png;base64,aGVsbG8=",
        "DATA:;BASE64,aGVsbG8=",
        "data:image/png;charset=x;base64,aGVs\nbG8=\n",
    ],
)
def test_base64_and_data_urls_unwrap_to_the_same_bytes(text: str) -> None:
    assert forms.unwrap(text, "images[0]") == b"hello"


def test_what_is_not_base64_is_refused_with_its_place() -> None:
    for wrong in ("ä", "a b c?", "=", "data:image/png;base64"):
        with pytest.raises(InvalidInputError, match=r"images\[2\]"):
            forms.unwrap(wrong, "images[2]")


def test_raw_pixels_become_the_contracts_tensor() -> None:
    pixels_HWC = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    body = forms.ImageBody.model_validate(
        {
            "pixels": {
                "data": base64.b64encode(pixels_HWC.tobytes()).decode(),
                "dtype": "uint8",
                "shape": [2, 2, 3],
            }
        }
    )
    assert forms.image_message(body, "images[0]").pixels == pack(pixels_HWC)


def test_a_class_is_a_label_or_a_label_with_prompts() -> None:
    body = forms.ClassifyBody.model_validate(
        {"images": ["aGVsbG8="], "classes": ["cat", {"label": "dog", "prompts": ["a dog"]}]}
    )
    assert forms.class_messages(body.classes) == [
        spec_pb2.ClassPrompts(label="cat"),
        spec_pb2.ClassPrompts(label="dog", prompts=["a dog"]),
    ]
