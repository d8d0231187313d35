"""Which benchmarks there are: modules of this folder with a `main`, read without being imported.

Called by `python -m bench`, by `scripts/benchmarks.py` and by the tests.
"""

from __future__ import annotations

import ast
from pathlib import Path


def benchmarks(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Name → the first line of the docstring: what is measured."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found
