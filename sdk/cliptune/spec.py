"""Job specs from files and mappings.

In: a TOML, YAML or JSON file, or a mapping such as `tomllib` makes of one. Out: a `JobSpec` whose shape is
right, or a `SpecError` with the `path` of the wrong field ("train.batch_size", "evaluation.classes[0].label")
and what is `allowed` there. Called by both clients, the command line and the gateway; works offline.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from cliptune.dataset_layout import SCHEME, is_pattern, matching
from cliptune.errors import InvalidInputError, SpecError
from cliptune.spec_shape import NOT_EMPTY, RULES, Range, validate_shape, validate_values, wrong_value
from cliptune.v1 import spec_pb2

__all__ = [
    "is_map",
    "is_repeated",
    "load_spec",
    "read_mapping",
    "spec_from_mapping",
    "spec_from_part",
    "spec_to_mapping",
    "validate_shape",
    "with_paths_from",
    "with_settings",
]

_INTEGERS: Final = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def load_spec(path: str | os.PathLike[str], settings: Iterable[str] = ()) -> spec_pb2.JobSpec:
    """The spec in a `.toml`, `.json`, `.yaml` or `.yml` file, its shape checked.

    `settings` are changes such as "train.epochs=2", applied in order. Relative paths start from the file's
    folder (`with_paths_from`). `InvalidInputError` for a file that cannot be read.
    """
    file = Path(path)
    spec = spec_from_mapping(with_settings(read_mapping(file), settings))
    return with_paths_from(file.absolute().parent, spec)


def with_paths_from(folder: Path, spec: spec_pb2.JobSpec) -> spec_pb2.JobSpec:
    """A copy whose relative paths, and patterns of shards, that are there in `folder` are absolute.

    The daemon works in another folder. Other relative paths are left for its own data folder.
    """
    placed = spec_pb2.JobSpec()
    placed.CopyFrom(spec)
    for field in ("train", "validation", "image_root"):
        setattr(placed.data, field, _beside(folder, getattr(spec.data, field)))
    if spec.guard.HasField("probe"):
        for field in ("data", "image_root"):
            setattr(placed.guard.probe, field, _beside(folder, getattr(spec.guard.probe, field)))
    scheme, colon, model_path = spec.model.name.partition(":")
    if colon and scheme == "local-dir":
        placed.model.name = f"local-dir:{_beside(folder, model_path)}"
    return placed


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a spec file says, unchecked."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"the spec {file} cannot be read: {error.strerror}", file=file) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"the spec {file} is not UTF-8 text: {error}", file=file) from error
    content = _parse(file, text)
    if not isinstance(content, dict):
        raise SpecError(f"the spec {file} is not a table of fields", path="", allowed=_names(_ROOT))
    return content


def with_settings(mapping: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """A copy with changes such as "train.epochs=2" or 'publish.aliases=["prod"]': JSON, else plain text."""
    changed: dict[str, Any] = json.loads(json.dumps(mapping, default=str))
    for setting in settings:
        path, equals, text = setting.partition("=")
        *parents, leaf = path.strip().split(".")
        if not equals or not leaf or not all(parents):
            raise InvalidInputError(
                f"the setting {setting!r} does not have the form PATH=VALUE, as train.epochs=2"
            )
        table = changed
        for parent in parents:
            inner = table.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise SpecError(f"{path} cannot be set: {parent} is not a table", path=path, allowed="")
            table = inner
        try:
            table[leaf] = json.loads(text)
        except json.JSONDecodeError:
            table[leaf] = text
    return changed


def spec_from_mapping(mapping: Mapping[str, Any]) -> spec_pb2.JobSpec:
    """A `JobSpec` with the fields of `mapping`, its shape checked."""
    spec = spec_pb2.JobSpec()
    _fill(spec, mapping, "")
    validate_shape(spec)
    return spec


def spec_from_part(mapping: Mapping[str, Any]) -> spec_pb2.JobSpec:
    """The same of a part of a spec, such as a domain's recipe: nothing is required."""
    spec = spec_pb2.JobSpec()
    _fill(spec, mapping, "")
    validate_values(spec)
    return spec


def spec_to_mapping(spec: spec_pb2.JobSpec) -> dict[str, Any]:
    """Inverse of `spec_from_mapping`: JSON-able, only what was set."""
    from google.protobuf import json_format  # a client that only infers has no need of it

    return json_format.MessageToDict(spec, preserving_proto_field_name=True)


_ROOT: Final[Descriptor] = spec_pb2.JobSpec.DESCRIPTOR


def _parse(file: Path, text: str) -> object:
    suffix = file.suffix.lower()
    try:
        if suffix == ".toml":
            import tomllib  # a client that only infers has no need of it

            return tomllib.loads(text)
        if suffix == ".json":
            return json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"the spec {file} is not {suffix[1:].upper()}: {error}", file=file) from error
    if suffix not in (".yaml", ".yml"):
        allowed = ".toml, .json, .yaml, .yml"
        raise InvalidInputError(
            f"the spec {file} has none of the endings {allowed}", file=file, allowed=allowed
        )
    try:
        yaml = importlib.import_module(
            "yaml"
        )  # comes with cliptune[model]; the light client has no need of it
    except ImportError:
        raise InvalidInputError(
            f"reading {file} needs PyYAML: pip install pyyaml, or write the spec as TOML or JSON", file=file
        ) from None
    try:
        parsed: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"the spec {file} is not YAML: {error}", file=file) from error
    return parsed


def _beside(folder: Path, value: str) -> str:
    if not value or value.startswith(SCHEME) or Path(value).is_absolute():
        return value
    there = (folder / value).exists() or bool(is_pattern(value) and _matches(folder, value))
    return str(folder / value) if there else value


def _matches(folder: Path, pattern: str) -> list[str]:
    """The files that a pattern of shards, such as "shards/{000..127}.tar", means in `folder`."""
    inner = (folder / pattern).parent
    files = inner.iterdir() if inner.is_dir() else ()
    return matching((file.relative_to(folder).as_posix() for file in files), pattern)


def _fill(message: Any, mapping: object, path: str) -> None:
    descriptor: Descriptor = message.DESCRIPTOR
    if not isinstance(mapping, Mapping):
        raise wrong_value(path or "the spec", mapping, f"a table with the fields {_names(descriptor)}")
    fields = {field.json_name: field for field in descriptor.fields} | dict(descriptor.fields_by_name)
    for key, value in mapping.items():
        here = f"{path}.{key}" if path else str(key)
        field = fields.get(str(key))
        if field is None:
            raise _unknown(here, str(key), descriptor)
        here = f"{path}.{field.name}" if path else field.name
        if value is None:  # JSON's and YAML's way to leave a field out
            continue
        if is_map(field):
            _fill_map(field, getattr(message, field.name), value, here)
        elif is_repeated(field):
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                raise wrong_value(here, value, "a list")
            if not value and here in NOT_EMPTY:
                raise wrong_value(here, value, "at least one size in pixels, or leave it out")
            items = getattr(message, field.name)
            for index, item in enumerate(value):
                place = f"{here}[{index}]"
                if field.type == FieldDescriptor.TYPE_MESSAGE:
                    _fill(items.add(), item, place)
                else:
                    items.append(_scalar(field, item, place))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            inner.SetInParent()
            _fill(inner, value, here)
        else:
            setattr(message, field.name, _scalar(field, value, here))


def _fill_map(field: FieldDescriptor, entries: Any, value: object, path: str) -> None:
    """Keys are texts; values are texts or numbers, as the contract has them."""
    if not isinstance(value, Mapping):
        raise wrong_value(path, value, "a table of names and values")
    of_values = field.message_type.fields_by_name["value"]
    for key, item in value.items():
        entries[str(key)] = _scalar(of_values, item, f"{path}.{key}")


def is_map(field: FieldDescriptor) -> bool:
    """Whether a field is a table of names and values."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def is_repeated(field: FieldDescriptor) -> bool:
    """Whether a field is a list, or such a table."""
    # From protobuf 6.31 on there is a property for it, and `label` warns.
    told: bool | None = getattr(field, "is_repeated", None)
    return field.label == FieldDescriptor.LABEL_REPEATED if told is None else told


def _scalar(field: FieldDescriptor, value: object, path: str) -> object:
    """The value in the field's type.

    Numbers may come as text: the JSON form writes 64-bit integers so, and YAML reads 1e-5 so.
    """
    if field.type == FieldDescriptor.TYPE_STRING:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, str):
            return value
        raise wrong_value(path, value, _allowed(path, "a text"))
    if field.type == FieldDescriptor.TYPE_BOOL:
        if isinstance(value, bool):
            return value
        raise wrong_value(path, value, "true, false")
    number = _number(value)
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        if number is None or not math.isfinite(number):
            raise wrong_value(path, value, _allowed(path, "a number"))
        return float(number)
    low, high = _INTEGERS[field.type]
    if number is None or not math.isfinite(number) or number != int(number) or not low <= number <= high:
        raise wrong_value(path, value, _allowed(path, f"a whole number from {low} to {high}"))
    return int(number)


def _number(value: object) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _allowed(path: str, kind: str) -> str:
    rule = RULES.get(path)
    if rule is None:
        return kind
    return f"{kind.partition(' from ')[0]} {rule.allowed}" if isinstance(rule, Range) else rule.allowed


def _unknown(path: str, key: str, descriptor: Descriptor) -> SpecError:
    names = [field.name for field in descriptor.fields]
    message = f"{path} is not a field of the spec"
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    elsewhere = [p for p in _paths(_ROOT, "") if p.rpartition(".")[2] == key]
    if elsewhere or close:
        meant = elsewhere or [f"{path.removesuffix(key)}{close[0]}"]
        message += f" (did you mean {' or '.join(meant)}?)"
    return SpecError(f"{message}; allowed: {', '.join(names)}", path=path, allowed=", ".join(names))


def _paths(descriptor: Descriptor, prefix: str) -> list[str]:
    found = []
    for field in descriptor.fields:
        path = f"{prefix}{field.name}"
        found.append(path)
        if field.message_type is not None and field.label != FieldDescriptor.LABEL_REPEATED:
            found += _paths(field.message_type, f"{path}.")
    return found


def _names(descriptor: Descriptor) -> str:
    return ", ".join(field.name for field in descriptor.fields)
