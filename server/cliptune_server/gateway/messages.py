"""Protobuf messages as plain JSON, and their JSON schemas.

Like protobuf's own JSON form with field names as written in the contract, with three differences that a
reader of REST expects: 64-bit integers are numbers, NaN and infinity are null, and a field is left out only
where the message tells "not set" from "zero". Used by every route that answers with a message.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from typing import Annotated, Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import WithJsonSchema

from cliptune.v1 import data_pb2, error_pb2, job_pb2, model_pb2, spec_pb2, training_pb2

# Marks a place in a schema where the schema of a message belongs; `openapi.py` puts it there.
MESSAGE_KEY: Final = "x-message"

_Json = dict[str, Any]
JobJson = Annotated[_Json, WithJsonSchema({MESSAGE_KEY: job_pb2.Job.DESCRIPTOR.full_name})]
JobSpecJson = Annotated[_Json, WithJsonSchema({MESSAGE_KEY: spec_pb2.JobSpec.DESCRIPTOR.full_name})]
JobListJson = Annotated[
    _Json, WithJsonSchema({MESSAGE_KEY: training_pb2.ListJobsResponse.DESCRIPTOR.full_name})
]
ControlJson = Annotated[
    _Json, WithJsonSchema({MESSAGE_KEY: training_pb2.ControlJobResponse.DESCRIPTOR.full_name})
]
DatasetJson = Annotated[_Json, WithJsonSchema({MESSAGE_KEY: data_pb2.Dataset.DESCRIPTOR.full_name})]
DatasetListJson = Annotated[
    _Json, WithJsonSchema({MESSAGE_KEY: data_pb2.ListDatasetsResponse.DESCRIPTOR.full_name})
]
ItemErrorJson = Annotated[_Json, WithJsonSchema({MESSAGE_KEY: error_pb2.ItemError.DESCRIPTOR.full_name})]
MESSAGES: Final[tuple[Descriptor, ...]] = (
    job_pb2.Job.DESCRIPTOR,
    job_pb2.JobEvent.DESCRIPTOR,
    spec_pb2.JobSpec.DESCRIPTOR,
    training_pb2.ListJobsResponse.DESCRIPTOR,
    training_pb2.ControlJobResponse.DESCRIPTOR,
    error_pb2.ItemError.DESCRIPTOR,
    model_pb2.Model.DESCRIPTOR,
    data_pb2.Dataset.DESCRIPTOR,
    data_pb2.ListDatasetsResponse.DESCRIPTOR,
)

_INTEGERS: Final = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_FLOATS: Final = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}


def json_form(message: Message) -> dict[str, Any]:
    """A message as an object that `json.dumps(..., allow_nan=False)` takes."""
    form: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if _is_map(field):
            element = field.message_type.fields_by_name["value"]
            form[field.name] = {str(key): _json_value(element, value[key]) for key in value}
        elif _is_repeated(field):
            form[field.name] = [_json_value(field, element) for element in value]
        else:
            form[field.name] = _json_value(field, value)
    return form


def schemas(messages: Iterable[Descriptor] = MESSAGES) -> dict[str, Any]:
    """JSON schemas by name ("Job") of these messages and of all that they hold."""
    found: dict[str, Any] = {}
    pending = list(messages)
    while pending:
        descriptor = pending.pop()
        if descriptor.name in found or descriptor.full_name == Timestamp.DESCRIPTOR.full_name:
            continue
        properties = {field.name: _field_schema(field) for field in descriptor.fields}
        required = [field.name for field in descriptor.fields if not field.has_presence]
        found[descriptor.name] = {"type": "object", "title": descriptor.name, "properties": properties}
        if required and descriptor.name not in _REQUEST_ONLY:
            found[descriptor.name]["required"] = required
        for field in descriptor.fields:
            held = field.message_type
            if held is not None and _is_map(field):
                held = held.fields_by_name["value"].message_type
            if held is not None:
                pending.append(held)
    return found


# Parts of a spec, where a field left out takes its default.
_REQUEST_ONLY: Final = frozenset(spec_pb2.DESCRIPTOR.message_types_by_name)


def _json_value(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return json_form(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _field_schema(field: FieldDescriptor) -> dict[str, Any]:
    if _is_map(field):
        element = field.message_type.fields_by_name["value"]
        return {"type": "object", "additionalProperties": _element_schema(element)}
    if _is_repeated(field):
        return {"type": "array", "items": _element_schema(field)}
    return _element_schema(field)


def _element_schema(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type is not None:
        if field.message_type.full_name == Timestamp.DESCRIPTOR.full_name:
            return {"type": "string", "format": "date-time"}
        return {"$ref": f"#/components/schemas/{field.message_type.name}"}
    if field.enum_type is not None:
        return {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    if field.cpp_type in _INTEGERS:
        return {"type": "integer"}
    if field.cpp_type in _FLOATS:
        return {"type": ["number", "null"]}
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return {"type": "boolean"}
    return {"type": "string"}


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _is_repeated(field: FieldDescriptor) -> bool:
    told = getattr(field, "is_repeated", None)  # protobuf 6.31 and later, where `label` is deprecated
    return bool(field.label == FieldDescriptor.LABEL_REPEATED) if told is None else bool(told)
