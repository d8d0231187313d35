"""A job's report as one page that is readable on its own: no script, no font, no picture from elsewhere.

Enters: the figures, a few examples and pictures. Leaves: HTML. Called by `write`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any, Final

from cliptune_trainer.report.charts import Line, line_chart
from cliptune_trainer.report.examples import Examples, Thumbnail

_STYLE: Final = """
:root{color-scheme:light dark;--ink:#1d2433;--soft:#5b6577;--line:#d9dee7;--paper:#fff;--wash:#f4f6f9;
--blue:#2f6db3;--red:#c04f37;--green:#2e8555}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ef;--soft:#9aa5b8;--line:#333c4d;--paper:#161b24;
--wash:#1e2531;--blue:#6ea8ea;--red:#ec8468;--green:#6cc596}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:60rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)}
p,ul{margin:.4rem 0}.soft,figcaption{color:var(--soft);font-size:.85rem}
.table{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;margin:.5rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem .2rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right}td.n{white-space:nowrap}th{vertical-align:bottom}
@media(max-width:40rem){table{font-size:.75rem}th,td{padding-right:.45rem}}
tr+tr td{border-top:1px solid var(--line)}
.cards,.row{display:flex;flex-wrap:wrap;gap:.8rem}.cards>div{background:var(--wash);border-radius:8px;
padding:.6rem 1rem;min-width:8rem}.cards b{display:block;font-size:1.35rem}
figure{margin:0;width:9rem;font-size:.85rem}figure img{max-width:8rem;max-height:8rem;border-radius:4px;
display:block}figure.wide{display:flex;gap:.7rem;width:28rem;max-width:100%}
.wide img{flex:none;max-width:6rem;max-height:6rem}.right{color:var(--green)}.wrong{color:var(--red)}
.chart{flex:1 1 24rem;max-width:27rem}svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font-size:11px}svg .title{font-weight:600}
svg .axis{fill:var(--soft);font-size:10px}.grid{stroke:var(--line);stroke-width:.7}
.line{fill:none;stroke-width:1.6}.c0{stroke:var(--blue)}.c1{stroke:var(--red)}
circle.c0{fill:var(--blue)}circle.c1{fill:var(--red)}svg text.key{stroke:none}
svg text.key.c0{fill:var(--blue)}svg text.key.c1{fill:var(--red)}
img.picture{max-width:100%;border-radius:6px;background:#fff}
pre{background:var(--wash);padding:.8rem;border-radius:8px;overflow-x:auto;font-size:.82rem}
"""


def page_of(
    figures: Mapping[str, Any],
    samples: Sequence[Thumbnail],
    examples: Examples,
    pictures: Mapping[str, bytes],
    spec_text: str,
) -> str:
    """The whole page.

    Args:
        figures: of `figures_of`.
        samples: images to train on.
        examples: what the published model makes of validation images.
        pictures: PNGs by what they are: "guard", "confusion".
        spec_text: the spec as it ran, as a user would write it.
    """
    evaluations = figures["evaluations"]
    before = next((one for one in evaluations if one["occasion"] == "before"), None)
    after = next((one for one in reversed(evaluations) if one["occasion"] == "after"), None)
    name = figures["job"]["name"]
    parts = [
        _head(figures, before, after),
        _section("Before and after", _evaluation(before, after)),
        _section("What was kept of general knowledge", _guard(after, pictures.get("guard"))),
        _section("Curves", _curves(figures["curves"], evaluations)),
        _section("Classes", _classes(after, pictures.get("confusion"))),
        _section("Mistakes", _mistakes(examples)),
        _section("Retrieval", _retrieval(examples)),
        _section("Data", _data(figures["data"], samples)),
        _section("Device, time and cost", _costs(figures)),
        _section("Decisions", _decisions(figures["decisions"])),
        _section("Notices", _notices(figures["notices"])),
        _section("Spec", f"<pre>{escape(spec_text)}</pre>"),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}: report</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _head(figures: Mapping[str, Any], before: Any, after: Any) -> str:
    job, time = figures["job"], figures["time"]
    cards = []
    if after and (main := after.get("main_metric")):
        gain = _number(after["metrics"][main])
        was = f"{_number(before['metrics'].get(main))} before" if before else ""
        cards.append((gain, main, was))
    if after and (general := after.get("general")):
        loss = _lost(general, "lost", "gained")
        cards.append((_number(general["metrics"][general["main_metric"]]), "general knowledge", loss))
    cards.append((_duration(time["device_s"]), "on the device", figures["device"]["name"]))
    told = "".join(
        f'<div><b>{escape(value)}</b>{escape(what)}<div class="soft">{escape(more)}</div></div>'
        for value, what, more in cards
    )
    domain = f", domain {job['domain']}" if job["domain"] else ""
    return (
        f"<h1>{escape(job['name'])}</h1>"
        f'<p class="soft">job {escape(job["id"])}: {escape(job["start"])} fine-tuned{escape(domain)},'
        f" finished {escape(_moment(time['finished']))}</p><div class=cards>{told}</div>"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column holds names, the others numbers."""
    rows = list(rows)
    if not rows:
        return ""
    top = "".join(f"<th{' class=n' if place else ''}>{escape(cell)}</th>" for place, cell in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if place else ''}>{escape(cell)}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<div class=table><table><tr>{top}</tr>{body}</table></div>"


def _evaluation(before: Any, after: Any) -> str:
    if not after:
        return ""
    was = before["metrics"] if before else {}
    main = after.get("main_metric", "")
    names = sorted(after["metrics"], key=lambda name: (name != main, *_natural(name)))
    rows = []
    for name in names:
        interval = after.get("intervals", {}).get(name)
        told = (
            f"{_number(interval.get('low', 0.0))} to {_number(interval.get('high', 0.0))}" if interval else ""
        )
        star = " *" if name == main else ""
        rows.append((name + star, _number(was.get(name)), _number(after["metrics"][name]), told))
    told = f"{after.get('samples', 0)} validation images at step {after.get('step', 0)}"
    return (
        _table(("metric", "before", "after", "95 % interval"), rows)
        + f'<p class="soft">{told}; * says how good the model is.</p>'
    )


def _natural(name: str) -> tuple[str, int]:
    """For sorting: @5 before @10."""
    stem, _, number = name.partition("@")
    return stem, int(number) if number.isdigit() else 0


def _guard(after: Any, picture: bytes | None) -> str:
    if not after or "general" not in after:
        return ""
    general, parts = after["general"], []
    interval = general.get("interval")
    sure = (
        f" (95 %: {_number(interval.get('low', 0.0))} to {_number(interval.get('high', 0.0))})"
        if interval
        else ""
    )
    parts.append(
        f"<p>{escape(general['main_metric'])} {_number(general['metrics'][general['main_metric']])}{sure},"
        f" {_lost(general, 'less', 'more')} than the starting model.</p>"
    )
    if "guard" in after:
        curve = after["guard"]
        parts.append(f"<p>Published: {escape(curve['reason'])}.</p>")
        if picture:
            parts.append(
                f'<img class="picture" alt="domain gain against general loss" src="{_png(picture)}">'
            )
        rows = [
            (
                f"{point.get('share', 0.0):g}" + (" (published)" if place == curve.get("chosen", 0) else ""),
                _number(point.get("domain", 0.0)),
                f"{100 * point.get('domain_gain', 0.0):+.2f}",
                _number(point.get("general", 0.0)),
                f"{100 * point.get('general_loss', 0.0):.2f}",
            )
            for place, point in enumerate(curve["points"])
        ]
        head = ("share of the way", "domain", "gain in points", "general", "loss in points")
        parts.append(_table(head, rows))
    return "".join(parts)


def _curves(curves: Mapping[str, Sequence[float | None]], evaluations: Sequence[Any]) -> str:
    steps = curves["step"]

    def line(name: str) -> Line:
        known = [(x, y) for x, y in zip(steps, curves[name], strict=True) if x is not None and y is not None]
        return Line(name=name, points=known)

    charts = [
        line_chart(name.replace("_", " "), [line(name)], "step")
        for name in ("loss", "learning_rate", "gradient_norm", "samples_per_second")
    ]
    over_time = [one for one in evaluations if one["occasion"] != "requested"]
    main = over_time[-1].get("main_metric", "") if over_time else ""
    points = [
        (float(one.get("step", 0)), one["metrics"][main]) for one in over_time if main in one["metrics"]
    ]
    lines = [Line(name=main, points=points, marks=True)]
    general = [
        (float(one.get("step", 0)), one["general"]["metrics"][one["general"]["main_metric"]])
        for one in over_time
        if "general" in one
    ]
    if general:
        lines.append(Line(name="general", points=general, marks=True))
    if points:
        charts.insert(0, line_chart("evaluations", lines, "step"))
    return f"<div class=row>{''.join(f'<div class=chart>{chart}</div>' for chart in charts if chart)}</div>"


def _classes(after: Any, picture: bytes | None) -> str:
    if not after or not after.get("classes"):
        return ""
    rows = [
        (
            entry["label"],
            str(entry.get("samples", 0)),
            *(
                _number(entry.get(name, 0.0))
                for name in ("precision", "recall", "auroc", "average_precision")
            ),
        )
        for entry in after["classes"]
    ]
    drawn = f'<img class="picture" alt="confusion matrix" src="{_png(picture)}">' if picture else ""
    return _table(("class", "images", "precision", "recall", "AUROC", "average precision"), rows) + drawn


def _mistakes(examples: Examples) -> str:
    return _row(
        _figure(
            one.image,
            f'{escape(one.image.label)} <span class="wrong">taken for {escape(one.taken_for)}</span>'
            f" ({one.share:.0%})",
        )
        for one in examples.mistaken
    )


def _retrieval(examples: Examples) -> str:
    if not examples.captioned:
        return ""
    told = (
        f'<p class="soft">Among {examples.asked} validation images and their texts; the likeliest first.</p>'
    )
    captioned = _row(
        _figure(one.image, "<br>".join(_judged(escape(text), right) for text, right in one.texts), wide=True)
        for one in examples.captioned
    )
    illustrated = "".join(
        f"<p>“{escape(one.text)}”</p>"
        + _row(
            _figure(image, _judged(escape(image.label or image.caption), right))
            for image, right in one.images
        )
        for one in examples.illustrated
    )
    return told + captioned + illustrated


def _judged(text: str, right: bool) -> str:
    mark, kind = ("✓", "right") if right else ("✗", "wrong")
    return f'<span class="{kind}">{mark}</span> {text}'


def _figure(image: Thumbnail, said: str, *, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><img src="{image.uri}" alt="{escape(image.caption)}">'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _row(figures: Iterable[str]) -> str:
    content = "".join(figures)
    return f"<div class=row>{content}</div>" if content else ""


def _data(data: Mapping[str, Any], samples: Sequence[Thumbnail]) -> str:
    rows = [
        (split, *(f"{data[split][what]:,}" for what in ("rows", "images", "captions")))
        for split in ("train", "validation")
    ]
    labels = [
        (label, f"{found['train']:,}", f"{found['validation']:,}") for label, found in data["labels"].items()
    ]
    told = [f"{data['bad_rows']} rows cannot be used and were left out."] if data["bad_rows"] else []
    told += [data["copies"]] if data["copies"] else []
    return (
        _table(("split", "rows", "images", "texts"), rows)
        + _table(("label", "train", "validation"), labels[:40])
        + "".join(f"<p>{escape(text)}</p>" for text in told)
        + _row(_figure(image, escape(image.caption)) for image in samples)
    )


def _costs(figures: Mapping[str, Any]) -> str:
    device, time = figures["device"], figures["time"]
    rows = [
        ("device", f"{device['name']} ({device['device']})"),
        ("precision", device["precision"]),
        ("pairs a step", f"{device['batch_size']}, {device['micro_batch_size']} at once"),
        ("attention", device["attention"]),
        ("parameters", f"{device['parameters']:,}"),
        ("memory", f"{device['memory_bytes'] / 2**30:.2f} GiB at most"),
        ("pairs a second", _number(device["samples_per_second"])),
        ("attempts", str(figures["job"]["attempts"])),
        ("time on the device", _duration(time["device_s"])),
    ]
    if time["cost"] is not None:
        rows.append(("cost", f"{time['cost']:.2f}, at {time['price_per_hour']:g} an hour"))
    return _table(("", ""), rows)


def _decisions(decisions: Sequence[Mapping[str, str]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(made['subject'])}</td><td>{escape(made.get('choice', ''))}</td>"
        f'<td class="soft">{escape(made.get("reason", ""))}</td></tr>'
        for made in decisions
    )
    return f"<div class=table><table>{rows}</table></div>" if rows else ""


def _notices(notices: Sequence[Mapping[str, str]]) -> str:
    items = "".join(f"<li>{escape(one['message'])}</li>" for one in notices[:40])
    return f"<ul>{items}</ul>" if items else ""


def _lost(general: Mapping[str, Any], less: str, more: str) -> str:
    points = 100 * general.get("loss", 0.0)
    return f"{abs(points):.2f} points {less if points >= 0 else more}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _moment(time: str) -> str:
    """To the minute, for people."""
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 6000 else f"{seconds / 3600:.1f} h"


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
