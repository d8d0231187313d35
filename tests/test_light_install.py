"""The base install is a light client."""

from __future__ import annotations

import re
from importlib.metadata import distribution

LIMIT = 10


def needed(name: str, found: set[str]) -> set[str]:
    """Names of all distributions that `name` needs without extras, on this machine."""
    from packaging.requirements import Requirement

    for text in distribution(name).requires or ():
        requirement = Requirement(text)
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and key not in found:
            found.add(key)
            needed(key, found)
    return found


def test_the_client_brings_at_most_ten_packages_and_no_torch() -> None:
    packages = needed("cliptune", set())
    assert len(packages) <= LIMIT, sorted(packages)
    assert "grpcio" in packages
    assert not packages & {"torch", "pillow", "fastapi", "sqlalchemy", "open-clip-torch"}
