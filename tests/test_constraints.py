"""constraints.txt is for every Python that pyproject.toml says: a version that left 3.10 behind is pinned for the others alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "3.10"
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_a_pin_is_for_the_oldest_python_where_its_version_is(pin: Requirement) -> None:
    try:
        installed = distribution(pin.name)
    except PackageNotFoundError:
        pytest.skip(f"{pin.name} is not installed here")
    if not pin.specifier.contains(installed.version):
        pytest.skip(f"another version of {pin.name} is installed here")
    needs = SpecifierSet(installed.metadata["Requires-Python"] or "")
    assert (pin.marker is None or pin.marker.evaluate({"python_version": OLDEST})) == needs.contains(f"{OLDEST}.99"), needs
