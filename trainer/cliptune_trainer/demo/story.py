"""The demo from end to end: a daemon, a fine-tuning job watched live, and its model served over both faces.

Called by `cliptune demo`. Everything happens through the public doors: `cliptune serve` in a process of its
own, the SDK for gRPC, plain HTTP for REST. What is said to the person goes to stderr; the result is returned.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cliptune import Client, Evaluation, JobEvent
from cliptune.cli.follow import follow
from cliptune.embedded import DEFAULT_MODEL
from cliptune.errors import InternalError, UnavailableError
from cliptune_trainer.demo import elpv

STOP_LIMIT_S: Final = 60.0
REST_LIMIT_S: Final = 60.0
SERVED_CELLS: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo runs with.

    Half a pass by default: 864 of the 1,752 training images, each seen once, suffice for a clear gain and are
    a few minutes' work for two cores.
    """

    home: Path
    device: str = "auto"
    epochs: int = 1
    max_steps: int | None = 27
    batch_size: int = 32

    def with_epochs(self, epochs: int) -> DemoConfig:
        """The same with so many whole passes."""
        return dataclasses.replace(self, epochs=epochs, max_steps=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where the demo's daemon listens, "HOST:PORT" each."""

    grpc: str
    http: str


def tell(config: DemoConfig) -> dict[str, Any]:
    """Runs the story.

    Returns:
        `job`, `model`, `before` and `after` (the same metrics by name), `served` with `grpc` and `rest` (the
        answers of each face), `seconds`.

    Raises:
        DataError: the ELPV package is not installed.
        UnavailableError: the daemon did not start.
        InternalError: the job did not succeed, or the two faces disagree.
    """
    begun = time.monotonic()
    images = elpv.installed_folder()
    cells = elpv.read_cells(images)
    table = config.home / "data" / "elpv.csv"
    elpv.write_table(cells, table)
    _say(f"data: {len(cells)} solar cells from elpv-dataset. {elpv.LICENCE}")

    with _daemon(config.home, config.device, images) as addresses, Client(addresses.grpc) as client:
        _say(f"daemon: gRPC {addresses.grpc}, REST http://{addresses.http}, home {config.home}")
        job = client.create_job(job_spec(config, table, images))
        _say(f"job: {job.id}, in a trainer process of its own")
        follow(client, job.id)
        job = client.get_job(job.id)
        if job.model == "":
            raise InternalError(f"the job ended as {job.state}: {job.state_reason}", job=job.id)
        evaluations = _evaluations(client.watch_job(job.id))
        served = _one_of_each_kind(cells)
        grpc_answers = [_classify_grpc(client, job.model, images / cell.image) for cell in served]
        rest_answers = [_classify_rest(addresses, job.model, images / cell.image) for cell in served]
        for cell, answer in zip(served, grpc_answers, strict=True):
            _say(f"served: {cell.image} is {cell.label!r}; the model says {answer['label']!r}")
        if grpc_answers != rest_answers:
            raise InternalError(f"gRPC says {grpc_answers}, REST says {rest_answers}")
    for name in sorted(evaluations["before"]):
        _say(f"  {name:45} {evaluations['before'][name]:.3f} -> {evaluations['after'][name]:.3f}")
    _say(f"to go on: cliptune serve --home {config.home}")
    return {
        "job": job.id,
        "model": job.model,
        **evaluations,
        "served": {"grpc": grpc_answers, "rest": rest_answers},
        "seconds": round(time.monotonic() - begun, 1),
    }


def job_spec(config: DemoConfig, table: Path, images: Path) -> dict[str, Any]:
    """The job, as a mapping of the form that a TOML file has."""
    return {
        "name": "solar-cells",
        "model": {"name": DEFAULT_MODEL},
        "data": {
            "train": str(table),
            "image_root": str(images),
            "label_column": "label",
            "split_column": "split",
            "group_column": "block",
            "augmentation": "flip",
        },
        "train": {
            "epochs": config.epochs,
            **({"max_steps": config.max_steps} if config.max_steps else {}),
            "batch_size": config.batch_size,
            "learning_rate": 3e-4,
            "progress_every_steps": 9,
        },
        "loss": {"name": "multi_positive"},
        "evaluation": {
            "classes": [{"label": k, "prompts": v} for k, v in elpv.class_prompts().items()],
            "every_epochs": 0,
        },
        "publish": {"model": "solar-cells", "aliases": ["prod"]},
        "resources": {"device": config.device},
    }


@contextmanager
def _daemon(home: Path, device: str, images: Path) -> Iterator[Addresses]:
    """A daemon on free ports for as long as the block lasts; its log is `home`/daemon.log."""
    command = [
        sys.executable,
        "-m",
        "cliptune_server",
        "--home",
        str(home),
        "--grpc-port",
        "0",
        "--http-port",
        "0",
    ]
    command += ["--device", device, "--data-root", str(home / "data"), "--data-root", str(images)]
    log_path = home / "daemon.log"
    with (
        log_path.open("ab") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                tail = log_path.read_text(errors="replace")[-2000:]
                raise UnavailableError(f"the daemon did not start; the end of {log_path}:\n{tail}")
            listening = json.loads(line)
            yield Addresses(grpc=listening["grpc"], http=listening["http"])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    _say("daemon: stopped")


def _evaluations(events: Iterator[JobEvent]) -> dict[str, dict[str, float]]:
    """Metrics by name of the evaluations "before" and "after" training."""
    found = {e.body.occasion: dict(e.body.metrics) for e in events if isinstance(e.body, Evaluation)}
    return {occasion: found[occasion] for occasion in ("before", "after")}


def _one_of_each_kind(cells: list[elpv.Cell]) -> list[elpv.Cell]:
    """Three cells of the test split with three labels: never trained on, nor chosen by result."""
    first = {cell.label: cell for cell in reversed(cells) if cell.split == "test"}
    return [first[label] for label in sorted(first)[:SERVED_CELLS]]


def _classify_grpc(client: Client, model: str, path: Path) -> dict[str, Any]:
    answer = client.classify([path], elpv.class_prompts(), model=model)[0]
    return _answer({label: answer.probabilities[label] for label in elpv.class_prompts()})


def _classify_rest(addresses: Addresses, model: str, path: Path) -> dict[str, Any]:
    body = {
        "model": model,
        "images": [base64.b64encode(path.read_bytes()).decode("ascii")],
        "classes": [{"label": label, "prompts": prompts} for label, prompts in elpv.class_prompts().items()],
    }
    request = urllib.request.Request(
        f"http://{addresses.http}/v1/classify",
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=REST_LIMIT_S) as response:
        answer = json.load(response)
    return _answer(dict(zip(answer["labels"], answer["probabilities"][0], strict=True)))


def _answer(probabilities: dict[str, float]) -> dict[str, Any]:
    """One image's answer in a form that both faces share."""
    return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
