"""`cliptune`: finds the verbs, runs one, and turns its errors into one line and an exit status.

Exit status: what the verb returns; 2 for a wrong command line or wrong input, 1 for any other error, 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Final

from cliptune import __version__
from cliptune.cli.verb import ENTRY_POINT_GROUP, Verb
from cliptune.errors import CliptuneError, InvalidInputError

# Packages that the extras bring: an import of one of them that fails is answered with how to get it.
_BROUGHT_BY: Final[Mapping[str, str]] = {
    "cliptune_server": "server",
    "cliptune_trainer": "trainer",
    "cliptune_model": "model",
    "elpv_dataset": "demo",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    points = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    # Only the verb that is asked for is loaded; for the list of verbs, all.
    wanted = next((word for word in given if not word.startswith("-")), "")
    chosen = [wanted] if wanted in points else sorted(points)
    verbs: dict[str, Verb] = {}
    for name in chosen:
        try:
            verbs[name] = points[name].load()
        except ImportError as error:
            if name == wanted:
                return _missing(_extra(error, ""), error)
    parser = build_parser(verbs)
    options = parser.parse_args(given)
    verb = verbs[options.verb]
    try:
        return verb.run(options)
    except ImportError as error:
        extra = _extra(error, verb.extra)
        if not extra:
            raise
        return _missing(extra, error)
    except CliptuneError as error:
        print(f"error: {type(error).__name__}: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInputError) else 1
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="cliptune",
        description="Fine-tune CLIP for your domain, watch it learn, serve it.",
        epilog="`cliptune VERB --help` shows a verb's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"cliptune {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in verbs.items():
        examples = "\n".join(f"  {example}" for example in verb.examples)
        sub = subparsers.add_parser(
            name,
            help=verb.summary,
            description=verb.summary,
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(sub)
    return parser


def _extra(error: ImportError, declared: str) -> str:
    return declared or _BROUGHT_BY.get((error.name or "").partition(".")[0], "")


def _missing(extra: str, error: ImportError) -> int:
    what = error.name or str(error)
    how = f"pip install 'cliptune[{extra}]'" if extra else str(error)
    print(f"error: {what} is not installed: {how}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
