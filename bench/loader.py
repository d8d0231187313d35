"""Images a second from JPEG files to batches, by processes; and how much of the step's own rate they feed.

Photo-like JPEGs of 640 × 480 and about 59 KB. Ours reads tar shards; the peer is what open_clip offers for
files: its CSV data set in torch's DataLoader, with as many processes, and its evaluation transform or, under
`--augmentation crop`, its training one. Then, on a GPU, whole training steps (bf16, 24 tokens) on batches
that lie ready in its memory and on batches from the shards, in turns; on the CPU the same with a tiny model.
"""

# Decoding processes import this module again: what brings torch is imported inside.
from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from bench.photos import write_photos


def main() -> None:
    """Entry point."""
    import torch

    from bench.feeding import Setting, fed_steps, loader_rates
    from bench.record import cores, gpu, report

    cuda = torch.cuda.is_available()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    by_default = sorted({1, count // 2, count - 1, count} - {0})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16" if cuda else "cliptune-tiny-vit")
    parser.add_argument("--batch", type=int, default=512 if cuda else 32)
    parser.add_argument("--rows", type=int, default=16_384 if cuda else 1_000)
    parser.add_argument("--workers", type=int, nargs="+", default=by_default, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=12_288 if cuda else 600, help="of one measurement")
    parser.add_argument("--steps", type=int, default=30 if cuda else 12, help="of one measurement")
    parser.add_argument("--augmentation", default="none", choices=["none", "flip", "crop"])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(count)
    with tempfile.TemporaryDirectory() as folder:
        shards, table, jpeg_bytes = write_photos(Path(folder), arguments.rows)
        print(f"{arguments.rows} JPEGs of {jpeg_bytes / 1000:.1f} KB on average")
        setting = Setting(
            model=arguments.model,
            batch_size=arguments.batch,
            device="cuda" if cuda else "cpu",
            shards=shards,
            table=table,
            augmentation=arguments.augmentation,
            repetitions=arguments.repetitions,
        )
        rows = loader_rates(setting, arguments.workers, arguments.images)
        fed = fed_steps(setting, arguments.workers[-1], arguments.steps)
    report(
        "loader",
        rows,
        device=gpu(torch.cuda.get_device_name()) if cuda else cores(),
        more={f"Steps fed from shards, {count} cores": fed},
    )


if __name__ == "__main__":
    main()
