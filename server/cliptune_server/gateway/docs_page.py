"""`/docs`: the OpenAPI description as one HTML page, whole by itself.

In: the page that `openapi.py` completes. Out: HTML without a script, a font or a style from elsewhere, to be
read also on a machine that sees no network. Served by `app.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

_Node = Mapping[str, Any]
_SCHEMAS: Final = "#/components/schemas/"
_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid #8884; border-radius: .3rem; }
details { border: 1px solid #8884; border-radius: .3rem; margin: .35rem 0; padding: .35rem .7rem; }
summary { cursor: pointer; } summary b { display: inline-block; width: 4rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-top: 1px solid #8883; }
"""


def docs_page(page: _Node) -> str:
    """The HTML of an OpenAPI description."""
    info = page["info"]
    tags = page.get("tags", [])
    groups = "".join(_group(page, tag) for tag in tags)
    schemas = "".join(_schema(name, schema) for name, schema in sorted(page["components"]["schemas"].items()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} <small>{escape(info['version'])}</small></h1>"
        f"{_prose(info.get('description', ''))}"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{groups}<h2>Bodies</h2>{schemas}</body></html>"
    )


def _group(page: _Node, tag: _Node) -> str:
    operations = "".join(
        _operation(path, method, operation)
        for path, item in page["paths"].items()
        for method, operation in item.items()
        if tag["name"] in operation.get("tags", ())
    )
    return f"<h2>{escape(tag['name'])}</h2>{_prose(tag.get('description', ''))}{operations}"


def _operation(path: str, method: str, operation: _Node) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    title = f"<b>{method.upper()}</b> <code>{escape(path)}</code> {escape(operation['summary'])}"
    parts = [_prose(operation.get("description", ""))]
    if parameters := operation.get("parameters"):
        rows = [
            (
                f"<code>{escape(each['name'])}</code>",
                escape(each["in"]) + (", required" if each.get("required") else ""),
                _type(each.get("schema", {})),
                _inline(each.get("description", "")),
            )
            for each in parameters
        ]
        parts.append(_table(("Parameter", "In", "Type", ""), rows))
    if body:
        kinds = [
            (f"<code>{escape(kind)}</code>", _type(said.get("schema", {}))) for kind, said in body.items()
        ]
        parts.append(_table(("Body", "Type"), kinds))
    answers = [
        (escape(status), _inline(said.get("description", "")), _types_of(said))
        for status, said in operation["responses"].items()
    ]
    parts.append(_table(("Status", "Answer", "Type"), answers))
    return _folded(operation["operationId"], title, "".join(parts))


def _schema(name: str, schema: _Node) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>" + (" *" if field in required else ""),
            _type(said),
            _inline(said.get("description", "")),
        )
        for field, said in schema.get("properties", {}).items()
    ]
    fields = _table(("Field", "Type", ""), rows) if rows else f"<p>{_type(schema)}</p>"
    examples = "".join(
        f"<pre>{escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>"
        for example in schema.get("examples", ())
    )
    told = _prose(schema.get("description", ""))
    return _folded(name, f"<code>{escape(name)}</code>", f"{told}{fields}{examples}")


def _folded(anchor: str, title: str, content: str) -> str:
    # The anchor is inside: a browser that goes there unfolds what holds it.
    return f'<details><summary>{title}</summary><div id="{escape(anchor)}">{content}</div></details>'


def _types_of(said: _Node) -> str:
    types = (_type(each.get("schema", {})) for each in said.get("content", {}).values())
    return ", ".join(dict.fromkeys(types))


def _type(schema: _Node) -> str:
    """A schema in a few words, with links to those that have a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(_SCHEMAS))
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[key]))
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of {_type(schema['additionalProperties'])}"
    if kind == "object" and "properties" in schema:
        fields = (f"{escape(name)}: {_type(said)}" for name, said in schema["properties"].items())
        return f"{{{', '.join(fields)}}}"
    return escape(" or ".join(kind) if isinstance(kind, list) else str(kind))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{cells}</table>"


def _prose(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in paragraphs if paragraph)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
