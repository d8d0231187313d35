"""A verb of the command line: what every room hands to `cliptune`.

A room makes a module-level `Verb` and names it in the entry-point group `cliptune.verbs`. Its module imports
only the standard library and `cliptune` at the top, so that `cliptune --help` stays quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

ENTRY_POINT_GROUP: Final = "cliptune.verbs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verb:
    """One subcommand."""

    name: str
    summary: str
    """One line, for the list of verbs and the head of `--help`."""
    examples: tuple[str, ...]
    """Whole command lines, shown at the end of `--help`."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Does the work and returns the exit status. A CliptuneError that leaves it is printed as one line."""
    extra: str = ""
    """The extra that brings what `run` imports; named when an import fails."""
