"""`cliptune models ...`: published models, their aliases, what is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from cliptune.cli.connection import (
    add_address,
    add_json,
    connect,
    mapping,
    moment,
    print_json,
    print_table,
)
from cliptune.cli.verb import Verb
from cliptune.client import Client
from cliptune.evaluation_lines import metric_rows
from cliptune.lines import size
from cliptune.model import Model


def _list(client: Client, options: argparse.Namespace) -> int:
    _print(client.list_models(options.name), as_json=options.json)
    return 0


def _show(client: Client, options: argparse.Namespace) -> int:
    model = client.get_model(options.model)
    if options.json:
        print_json(mapping(model.message))
        return 0
    print(f"{model.reference}  {', '.join(model.aliases) or 'no alias'}")
    side = model.serving_size or model.image_size
    print(f"{model.architecture}, {model.embedding_dim} dimensions, {side} pixels")
    values = ", ".join(f"{name} {value:.4g}" for name, value in sorted(model.similarity_parameters.items()))
    print(f"compared by {model.similarity}" + (f" ({values})" if values else ""))
    print(f"created {moment(model.created)}" + (f" by job {model.job_id}" if model.job_id else ""))
    for alias, traffic in sorted(model.message.traffic.items()):
        parts = [f"{one.share:.3g} to {one.version}" for one in traffic.shares]
        parts += [f"copies to {traffic.shadow_version}"] if traffic.shadow_version else []
        print(f"of {alias}'s requests {', '.join(parts)}")
    for proven in model.sizes:
        print(
            f"at {proven.height} x {proven.width} pixels: {proven.value:.4f},"
            f" {proven.images_per_second:,.0f} images/s, {proven.latency_ms:.1f} ms"
        )
    print(f"loaded on {model.device}" if model.loaded else "not loaded")
    for line in _served(model):
        print(line)
    print(f"{model.path}, {size(model.bytes)}")
    if model.metrics:
        print_table(("METRIC", "VALUE"), metric_rows(model.metrics))
    return 0


def _served_in(model: Model) -> str:
    """ "fp32", "bf16 0.99987": the precision, and its cosine to fp32 where it is another."""
    if not model.message.HasField("served"):
        return "-"
    way = model.message.served
    return way.precision if way.precision == "fp32" else f"{way.precision} {way.precision_cosine:.5f}"


def _served(model: Model) -> Iterator[str]:
    """How the engine computes: precision, decoding, towers, and how near that is to the exact way."""
    if not model.message.HasField("served"):
        return
    way = model.message.served
    cosine = f" (cosine to fp32 {way.precision_cosine:.5f})" if way.precision != "fp32" else ""
    yield f"served in {way.precision}{cosine}; towers {way.towers}: {way.towers_reason}"
    if way.decode != "exact":
        yield f"images decoded {way.decode} (cosine to the exact transform {way.decode_cosine:.5f})"


def _print(models: Sequence[Model], *, as_json: bool) -> None:
    if as_json:
        print_json([mapping(model.message) for model in models])
        return
    rows = [
        (
            model.reference,
            ",".join(model.aliases) or "-",
            model.device or "yes" if model.loaded else "-",
            _served_in(model),
            model.architecture,
            size(model.bytes),
            moment(model.created),
        )
        for model in models
    ]
    print_table(("MODEL", "ALIASES", "LOADED", "SERVED IN", "ARCHITECTURE", "SIZE", "CREATED"), rows)


def _changed(
    change: Callable[[Client, argparse.Namespace], Model],
) -> Callable[[Client, argparse.Namespace], int]:
    def run(client: Client, options: argparse.Namespace) -> int:
        _print([change(client, options)], as_json=options.json)
        return 0

    return run


def _traffic(client: Client, options: argparse.Namespace) -> Model:
    return client.set_traffic(options.model, dict(options.shares), shadow=options.shadow)


def _share(text: str) -> tuple[int, float]:
    """ "2=10%" or "2=0.1"."""
    version, _, share = text.partition("=")
    try:
        part = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
        return int(version), part
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no VERSION=SHARE, such as 2=10%") from None


def _unalias(client: Client, options: argparse.Namespace) -> int:
    client.delete_alias(options.name, options.alias)
    return 0


def _delete(client: Client, options: argparse.Namespace) -> int:
    client.delete_model(options.model)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(
        name: str, summary: str, run: Callable[[Client, argparse.Namespace], int], *, of_model: bool = True
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary)
        if of_model:
            sub.add_argument("model", help="NAME, NAME:VERSION or NAME@ALIAS")
        add_json(sub)
        add_address(sub)
        sub.set_defaults(action_run=run)
        return sub

    listing = action("list", "list published models", _list, of_model=False)
    listing.add_argument("name", nargs="?", default="", help="only versions of this model")
    action("show", "show a model with its metrics", _show)
    action("load", "load a model for inference", _changed(lambda client, o: client.load_model(o.model)))
    action("unload", "stop serving a model", _changed(lambda client, o: client.unload_model(o.model)))
    alias = action(
        "alias",
        "point NAME@ALIAS at a version",
        _changed(lambda client, o: client.set_alias(o.model, o.alias)),
    )
    alias.add_argument("alias", help="such as prod")
    traffic = action("traffic", "share the requests for NAME@ALIAS among versions", _changed(_traffic))
    traffic.add_argument(
        "shares", nargs="*", type=_share, metavar="VERSION=SHARE", help="such as 2=10%%; none: all to its own"
    )
    traffic.add_argument(
        "--shadow", type=int, default=0, metavar="VERSION", help="gets copies, and answers nobody"
    )
    unalias = action("unalias", "remove an alias; the version stays", _unalias, of_model=False)
    unalias.add_argument("name", help="the model's name")
    unalias.add_argument("alias", help="such as prod")
    action("delete", "remove a version that is not loaded and has no alias", _delete)


def _run(options: argparse.Namespace) -> int:
    with connect(options) as client:
        status: int = options.action_run(client, options)
        return status


models = Verb(
    name="models",
    summary="list, load and alias published models",
    examples=(
        "cliptune models list",
        "cliptune models alias cells:3 prod     # cells@prod now means version 3",
        "cliptune models load cells@prod",
        "cliptune models traffic cells@prod 4=10%   # version 4 answers a tenth of the requests",
        "cliptune models show cells --json",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
