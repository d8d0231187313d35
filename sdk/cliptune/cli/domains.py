"""`cliptune domains ...`: the recipes for kinds of images, and what a spec comes to with its own.

Works offline. "later" is while the job prepares: its plan then says what was chosen, and why.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable
from typing import Any, Final

from cliptune.cli.connection import add_json, mapping, print_json, print_table
from cliptune.cli.verb import Verb
from cliptune.domains import NAMES, Layered, chosen_later, layered, load_recipe
from cliptune.spec import load_spec

_INDENT: Final = " " * 6
# Characters of a value in a table.
_WIDEST: Final = 60


def _list(options: argparse.Namespace) -> int:
    recipes = [load_recipe(name) for name in NAMES]
    if options.json:
        print_json([{"name": recipe.name, "summary": recipe.summary} for recipe in recipes])
    else:
        print_table(("DOMAIN", "FOR"), [(recipe.name, recipe.summary) for recipe in recipes])
    return 0


def _show(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.name)
    if options.json:
        print_json(
            {
                "name": recipe.name,
                "summary": recipe.summary,
                "spec": mapping(recipe.spec),
                "why": dict(recipe.why),
            }
        )
        return 0
    print(f"{recipe.name}: {recipe.summary}")
    said: set[str] = set()
    for path, value in recipe.fields():
        part = recipe.reasoned_part(path)
        if part not in said:
            print()
            print("\n".join(_wrapped(recipe.why.get(part, ""))))
            said.add(part)
        print(f"  {path} = {_shown(value)}")
    return 0


def _explain(options: argparse.Namespace) -> int:
    found = layered(load_spec(options.spec, options.settings))
    later = {path: how for path, how in chosen_later().items() if not _has(found, path)}
    if options.json:
        print_json(
            {
                "spec": mapping(found.spec),
                "origins": dict(found.origins),
                "chosen_later": later,
                "why": {path: found.domain.reason(path) for path in found.from_domain()}
                if found.domain
                else {},
            }
        )
        return 0
    rows = [
        (path, textwrap.shorten(_shown(found.value(path)), _WIDEST, placeholder=" ..."), origin)
        for path, origin in found.origins.items()
    ]
    rows += [(path, "-", f"later: {how}") for path, how in later.items()]
    print_table(("FIELD", "VALUE", "FROM"), rows)
    if found.domain is not None:
        print(f"\nwhy {found.domain.name}:")
        for part in dict.fromkeys(found.domain.reasoned_part(path) for path in found.from_domain()):
            print(f"  {part}")
            print("\n".join(_wrapped(found.domain.why.get(part, ""), _INDENT)))
    return 0


def _has(found: Layered, path: str) -> bool:
    return any(set_path == path or set_path.startswith(f"{path}.") for set_path in found.origins)


def _shown(value: object) -> str:
    """A value as TOML and JSON write it; a list of tables by their number."""
    if isinstance(value, str | bool | int | float):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Iterable):
        items = list(value)
        if all(isinstance(item, str | int | float) for item in items):
            return json.dumps(items, ensure_ascii=False)
        return f"{len(items)} of them"
    return "none"


def _wrapped(text: str, indent: str = "  # ") -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent=indent, subsequent_indent=indent)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, run: Any) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary)
        add_json(sub)
        sub.set_defaults(action_run=run)
        return sub

    action("list", "list the domains", _list)
    show = action("show", "show what a domain sets, and why", _show)
    show.add_argument("name", help=", ".join(NAMES))
    explain = action("explain", "show each field of a spec as it will run, and where it comes from", _explain)
    explain.add_argument("spec", help="TOML, YAML or JSON file with the job's spec")
    explain.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the spec, such as domain=medical; repeat for several",
    )


def _run(options: argparse.Namespace) -> int:
    status: int = options.action_run(options)
    return status


domains = Verb(
    name="domains",
    summary="recipes for kinds of images: list, show, explain",
    examples=(
        "cliptune domains list",
        "cliptune domains show medical",
        "cliptune domains explain spec.toml                        # each field and where it comes from",
        "cliptune domains explain spec.toml --set domain=medical   # what it would be in another domain",
    ),
    add_arguments=_add_arguments,
    run=_run,
)
