"""`cliptune embed`, `match`, `classify`: inference on image files, as a table, JSON lines or a .npy file."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cliptune.cli.connection import add_address, add_json, connect, note, print_json, print_table
from cliptune.cli.verb import Verb
from cliptune.errors import InvalidInputError
from cliptune.results import FailedItem


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="", help="NAME, NAME:VERSION or NAME@ALIAS (default: the only one loaded)"
    )
    parser.add_argument(
        "--resolution",
        default="",
        metavar="SIZE",
        help="of images: 224, 224x320, or fast, balanced or best (default: the model's serving size)",
    )
    add_json(parser, "one JSON object a line")
    add_address(parser)


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--text", action="append", default=[], dest="texts", help="embed texts instead")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.npy", help="write the array [N, D]; failed rows are NaN"
    )
    parser.add_argument("--progress", action="store_true", help="show a bar on stderr")
    _add_common(parser)


def _embed(options: argparse.Namespace) -> int:
    if bool(options.images) == bool(options.texts):
        raise InvalidInputError("give image files, or texts with --text")
    names = options.images or options.texts
    with connect(options) as client:
        vectors = client.embed_many(
            names,
            "images" if options.images else "texts",
            model=options.model,
            resolution=options.resolution,
            on_error="return",
            progress=options.progress,
        )
    failed = {item.index: item for item in vectors.errors}
    if options.output is not None:
        try:
            np.save(options.output, np.asarray(vectors))
        except OSError as error:
            raise InvalidInputError(f"{options.output} cannot be written: {error.strerror}") from error
    elif options.json:
        for index, name in enumerate(names):
            if index in failed:
                print_json({"input": name, "error": _told(failed[index])}, indent=None)
            else:
                print_json(
                    {"input": name, "model": vectors.model, "embedding": vectors[index].tolist()}, indent=None
                )
    else:
        rows = [(name, _first(vectors[i])) for i, name in enumerate(names) if i not in failed]
        print_table(("INPUT", f"EMBEDDING ({vectors.shape[1]} dimensions)"), rows)
    return _report(names, vectors.errors, quiet=options.json and options.output is None)


def _match_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument(
        "--text", action="append", required=True, dest="texts", help="a text; repeat for several"
    )
    _add_common(parser)


def _match(options: argparse.Namespace) -> int:
    with connect(options) as client:
        found = client.similarity(
            options.images,
            options.texts,
            model=options.model,
            resolution=options.resolution,
            on_error="return",
        )
    texts = [item for item in found.errors if item.field == "texts"]
    images = [item for item in found.errors if item.field == "images"]
    failed = {item.index: item for item in images}
    if options.json:
        for index, image in enumerate(options.images):
            if index in failed:
                print_json({"image": image, "error": _told(failed[index])}, indent=None)
            else:
                answered = zip(options.texts, found.scores[index].tolist(), strict=True)
                scores = {text: score for text, score in answered if score == score}
                print_json({"image": image, "model": found.model, "scores": scores}, indent=None)
    else:
        rows = [
            (image, *(f"{score:.4f}" for score in found.scores[index]))
            for index, image in enumerate(options.images)
            if index not in failed
        ]
        print_table(("IMAGE", *options.texts), rows)
    _report(options.texts, texts, quiet=False)
    status = _report(options.images, images, quiet=options.json)
    return 1 if texts else status


def _classify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument(
        "--class",
        action="append",
        required=True,
        dest="classes",
        metavar="LABEL[=PROMPT]",
        help="a class; repeat it with other prompts, which are averaged",
    )
    _add_common(parser)


def _classify(options: argparse.Namespace) -> int:
    classes: dict[str, list[str]] = {}
    for given in options.classes:
        label, _, prompt = given.partition("=")
        classes.setdefault(label, []).extend([prompt] if prompt else [])
    with connect(options) as client:
        answers = client.classify(
            options.images, classes, model=options.model, resolution=options.resolution, on_error="return"
        )
    failed = {item.index: item for item in answers.errors}
    if options.json:
        for index, image in enumerate(options.images):
            if index in failed:
                print_json({"image": image, "error": _told(failed[index])}, indent=None)
                continue
            print_json(
                {
                    "image": image,
                    "model": answers.model,
                    "label": answers[index].label,
                    "probability": answers[index].probability,
                    "probabilities": answers[index].probabilities,
                    "scores": answers[index].scores,
                },
                indent=None,
            )
    else:
        rows = [
            (
                image,
                answers[index].label,
                *(f"{answers[index].probabilities[label]:.4f}" for label in classes),
            )
            for index, image in enumerate(options.images)
            if index not in failed
        ]
        print_table(("IMAGE", "CLASS", *classes), rows)
    return _report(options.images, answers.errors, quiet=options.json)


def _report(names: list[str], failed: tuple[FailedItem, ...] | list[FailedItem], *, quiet: bool) -> int:
    """Says on stderr which inputs failed; exit status 1 when some did."""
    if not quiet:
        for item in failed:
            name = names[item.index].strip() or repr(names[item.index])
            note(f"error: {name}: {type(item.error).__name__}: {item.error.message}")
    return 1 if failed else 0


def _told(item: FailedItem) -> dict[str, str]:
    return {"reason": type(item.error).__name__, "message": item.error.message}


def _first(vector: np.ndarray[tuple[int], np.dtype[np.float32]]) -> str:
    return " ".join(f"{value:+.4f}" for value in vector[:6]) + (" ..." if len(vector) > 6 else "")


embed = Verb(
    name="embed",
    summary="embed images or texts into vectors",
    examples=(
        "cliptune embed cells/*.png --output cells.npy --progress",
        "cliptune embed cat.jpg --json",
        'cliptune embed --text "a cracked solar cell" --model cells@prod --json',
    ),
    add_arguments=_embed_arguments,
    run=_embed,
)
match = Verb(
    name="match",
    summary="similarity of images and texts",
    examples=(
        'cliptune match cat.jpg dog.jpg --text "a cat" --text "a dog"',
        'cliptune match *.png --text "a cracked solar cell" --model cells@prod --json',
    ),
    add_arguments=_match_arguments,
    run=_match,
)
classify = Verb(
    name="classify",
    summary="zero-shot classification of images",
    examples=(
        "cliptune classify cat.jpg --class cat --class dog",
        'cliptune classify *.png --class "ok=an intact cell" --class "crack=a cracked cell" \\',
        '    --class "crack=a cell with a crack" --json',
    ),
    add_arguments=_classify_arguments,
    run=_classify,
)
