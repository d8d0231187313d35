"""The towers as the engine serves them, beside open_clip's own forward: no network, no queue, no decoding.

Images at the model's size in batches, and captions of a few words, which open_clip pads to its context. Ours
are the engine's own forwards once everything is ready: frozen weights on a CPU, and graphs of small batches
on CUDA. With `--compile` torch.compile with frozen weights is another peer (CPU). With `--precision auto`
both sides compute in the lower precision that the engine would choose; open_clip by autocast.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.record import Row, gpu, report
from bench.turns import medians, seconds
from cliptune_model.acceleration.fidelity import PRECISIONS, choose_way
from cliptune_model.acceleration.lean import choose_lean, make_lean
from cliptune_model.clip import Clip, build
from cliptune_model.machine.device import choose_threads
from cliptune_model.machine.hardware import detect
from cliptune_model.source import ModelSource
from cliptune_server.engine.towers import Towers

BATCHES = (1, 8, 32)
TEXTS = ("a photo of a cat", "7", "a red car parked by the sea at night", "an X-ray of a wrist")


def ready(clip: Clip, precision: str) -> Towers:
    """As the engine has it some seconds after a load."""
    make_lean(clip, choose_lean(clip))
    clip.model.requires_grad_(False)
    way = choose_way(clip, detect(str(clip.device)), precision=precision, decode="exact")
    towers = Towers(clip, way.autocast(str(clip.device)), way.dtype)
    towers.freeze()
    while towers.record_next():
        pass
    print(f"precision {way.precision.value}: {way.precision.reason}")
    print(f"towers {towers.form.value}: {towers.form.reason}")
    return towers


def compiled(clip: Clip) -> Clip:
    """The image tower by torch.compile with frozen weights."""
    from torch._inductor import config  # heavy, and wanted on request alone

    config.freezing = True
    clip.model.requires_grad_(False)
    model: Any = clip.model
    model.visual = torch.compile(model.visual, dynamic=False)
    return clip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="architecture (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="exact", choices=PRECISIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile as another peer")
    arguments = parser.parse_args()
    threads = int(choose_threads(arguments.threads).value)
    torch.set_num_threads(threads)
    plain = build(ModelSource(name=arguments.model), device=arguments.device)
    plain.model.requires_grad_(False)
    towers = ready(copy.deepcopy(plain), arguments.precision)
    peers = {"open_clip": plain}
    if arguments.compile:
        peers["torch.compile, frozen"] = compiled(copy.deepcopy(plain))

    @torch.inference_mode()
    def peer(clip: Clip, batch: Tensor) -> None:
        given = batch.to(clip.device)
        with towers.autocast():
            found = clip.encode_texts(given) if given.ndim == 2 else clip.encode_images(given)
        torch.nn.functional.normalize(found.float(), dim=-1).cpu().numpy()

    rows = []
    way = f"{arguments.precision}, {threads} threads"
    for many in arguments.batches:
        images = torch.randn(many, 3, *plain.image_size)
        texts = [TEXTS[place % len(TEXTS)] for place in range(many)]
        padded, trimmed = plain.tokenize(texts), plain.tokenize_trimmed(texts)
        for kind, ours, batch in (
            ("images", partial(towers.images, images), images),
            ("short texts", partial(towers.texts, trimmed), padded),
        ):
            sides: dict[str, Callable[[], float]] = {"ours": seconds(ours)}
            for name, clip in peers.items():
                if kind == "images" or name == "open_clip":
                    sides[name] = seconds(partial(peer, clip, batch))
            found_s = medians(sides, arguments.repetitions, warm=3)
            rows += [
                Row(
                    case=f"{arguments.model} {kind}, {many} at once, {way}",
                    ours=many / found_s["ours"],
                    peer=many / took_s,
                    peer_name=name,
                    unit=f"{kind}/s",
                )
                for name, took_s in found_s.items()
                if name != "ours"
            ]
    on_gpu = arguments.device.startswith("cuda")
    report("towers", rows, device=gpu(torch.cuda.get_device_name()) if on_gpu else None)


if __name__ == "__main__":
    main()
