"""Lists of items as they become messages and come back, with the rule for items that fail.

Enters: a user's list. Leaves: messages with their places, and rows of an answer in those places. An image is
turned into a message here, so it can fail before anything is sent; the daemon can refuse others. Both kinds
are treated alike:

- on_error="raise" (default): the first failed item's own error, with `field`, `index` and `count` (how
  many failed) in its metadata;
- on_error="return": failed rows are NaN and listed in `.errors`. When nothing is left, the first error is
  raised.

Called by the codecs of inference calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cliptune.errors import CliptuneError, InvalidInputError, TextError, from_detail, from_wire
from cliptune.images import is_one_image
from cliptune.results import FailedItem, Float32
from cliptune.v1 import error_pb2

OnError: TypeAlias = Literal["raise", "return"]


def text_item(text: object) -> str:
    """A text that a message can hold. Whether it is empty or too long is the daemon's question."""
    if not isinstance(text, str):
        raise InvalidInputError(f"a text is a str, not {type(text).__name__}", type=type(text).__name__)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not valid Unicode: {error.reason} at {error.start}") from None
    return text


def placed(item: FailedItem, *, count: int, total: int) -> CliptuneError:
    """The item's error, saying where it stood among `total` items and how many failed."""
    error = item.error
    message = error.message if total == 1 else f"{item.field}[{item.index}]: {error.message}"
    metadata = {**error.metadata, "field": item.field, "index": str(item.index), "count": str(count)}
    return from_wire(type(error).__name__, message, metadata)


@dataclass(kw_only=True, slots=True)
class Gathered:
    """Items that became messages, and those that could not."""

    kind: str
    total: int
    messages: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    failed: list[FailedItem] = field(default_factory=list)


def gather(kind: str, items: object, convert: Callable[[Any], Any], on_error: OnError) -> Gathered:
    """Messages of all items that `convert` takes.

    Raises:
        InvalidInputError: no list, or an empty one.
        CliptuneError: an item's own, as the rule at the top says.
    """
    many = many_of(items, kind)
    if not many:
        raise InvalidInputError(f"{kind} is empty", field=kind)
    gathered = Gathered(kind=kind, total=len(many))
    for index, item in enumerate(many):
        try:
            message = convert(item)
        except CliptuneError as error:
            refused = FailedItem(field=kind, index=index, error=error)
            if on_error == "raise":
                raise placed(refused, count=1, total=len(many)) from error
            gathered.failed.append(refused)
        else:
            gathered.messages.append(message)
            gathered.places.append(index)
    if not gathered.messages:
        raise placed(gathered.failed[0], count=len(gathered.failed), total=len(many))
    return gathered


def settle(
    errors: Iterable[error_pb2.ItemError], on_error: OnError, *lists: Gathered
) -> tuple[FailedItem, ...]:
    """Every failed item of these lists, in order; raises as the rule at the top says."""
    places = {gathered.kind: tuple(gathered.places) for gathered in lists}
    answered = list(failed_items(errors, places))
    for gathered in lists:
        failed = gathered.failed + [item for item in answered if item.field == gathered.kind]
        failed.sort(key=lambda item: item.index)
        if failed and (on_error == "raise" or len(failed) == gathered.total):
            raise placed(failed[0], count=len(failed), total=gathered.total)
    everything = [item for gathered in lists for item in gathered.failed] + answered
    return tuple(sorted(everything, key=lambda item: (item.field, item.index)))


def failed_items(
    errors: Iterable[error_pb2.ItemError], places: Mapping[str, Sequence[int]]
) -> Iterator[FailedItem]:
    """What an answer tells of items that failed. `places`: field → places in the user's list."""
    for told in errors:
        known = places.get(told.field, ())
        index = known[told.index] if told.index < len(known) else told.index
        yield FailedItem(field=told.field, index=index, error=from_detail(told.error))


def scatter(answered: npt.NDArray[Any], rows: Gathered) -> Float32:
    """Rows in the places of the user's list; NaN where an item was never sent."""
    if len(rows.places) == rows.total:
        return np.array(answered, dtype=np.float32)
    whole = np.full((rows.total, *answered.shape[1:]), np.nan, np.float32)
    whole[rows.places] = answered
    return whole


def many_of(items: object, kind: str) -> Sequence[Any]:
    """The user's list, which may be any iterable. `InvalidInputError`: it is one item, or none."""
    if isinstance(items, str | bytes) or (kind == "images" and is_one_image(items)):
        raise InvalidInputError(f"{kind} is a single item, not a list: write [item]", field=kind)
    if not isinstance(items, Iterable):
        raise InvalidInputError(f"{kind} is {type(items).__name__}, not a list", field=kind)
    return list(items)
