"""`python -m scripts.mini STEP`: the steps of making both models; see the package's own docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.mini import towers


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m scripts.mini", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)

    def step(name: str, told: str) -> argparse.ArgumentParser:
        added = steps.add_parser(name, help=told)
        added.add_argument("--prepared", type=Path, default=Path(".mini"), help="what `prepare` makes")
        return added

    prepare = step("prepare", "fetch packages; render, tokenise, embed")
    prepare.add_argument("--clipart", type=Path, required=True, help="general_clipart.tar, or its folder")
    prepare.add_argument("--work", type=Path, help="folder for the packages (default: PREPARED/packages)")
    for name, default_s in (("images", 120.0), ("texts", 240.0)):
        train = step(name, f"train the {name[:-1]} towers")
        train.add_argument("--out", type=Path, default=Path(".mini/trained"), help="for the trained towers")
        train.add_argument("--device", default="cpu", help="cpu or cuda")
        train.add_argument(
            "--seconds", type=float, default=default_s, help="of training, each tower that is timed"
        )
        if name == "texts":
            train.add_argument(
                "--model", action="append", choices=(towers.MINI, towers.VIT), help="default: both"
            )
    pack = step("pack", "write the models as they are shipped")
    pack.add_argument("--trained", type=Path, default=Path(".mini/trained"), help="the trained towers")
    pack.add_argument("--target", type=Path, default=Path("mini/cliptune_mini"), help="the package")
    probe = steps.add_parser("probe", help="write the general probe as it is shipped")
    probe.add_argument("--clipart", type=Path, required=True, help="general_clipart's folder")
    probe.add_argument("--target", type=Path, default=Path("mini/cliptune_mini"), help="the package")
    _run(parser.parse_args())


def _run(arguments: argparse.Namespace) -> None:
    match arguments.step:
        case "prepare":
            from scripts.mini import prepare

            prepare.run(
                arguments.clipart, arguments.work or arguments.prepared / "packages", arguments.prepared
            )
        case "images":
            from scripts.mini import head, images, inversion, vit

            images.run(
                arguments.prepared,
                arguments.out,
                arguments.device,
                head.HeadPlan(),
                vit.ViTPlan(seconds=arguments.seconds),
                inversion.InversionPlan(),
            )
        case "texts":
            from scripts.mini import texts

            names = arguments.model or [towers.MINI, towers.VIT]
            plan = texts.TextPlan(seconds=arguments.seconds)
            texts.run(arguments.prepared, arguments.out, arguments.device, plan, names)
        case "pack":
            from scripts.mini import pack

            pack.run(arguments.prepared, arguments.trained, arguments.target)
        case "probe":
            from scripts.mini import probe

            probe.run(arguments.clipart, arguments.target)


if __name__ == "__main__":
    main()
