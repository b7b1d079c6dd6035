"""Fixtures that several test modules use, and the markers' rules."""

from pathlib import Path

import pytest
import torch

from ride_plugin import _compiler
from tests.reference import DATA, REFERENCE, arrays_in

EXPORTING_DOCTESTS = ("export_stages", "fuse_stages", "quantize_stages")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    present = REFERENCE.exists() and DATA.exists()
    absent = pytest.mark.skip(reason="the authors' numbers are not part of the repository")
    too_old = pytest.mark.skip(reason=f"torch {torch.__version__} is too old to compile or export")
    refused = {"compiles": not _compiler.COMPILES, "exports": not _compiler.EXPORTS}
    for item in items:
        marked = any(refused[name] for name in refused if item.get_closest_marker(name))
        example = item.name.startswith("ride_plugin.") and item.name.endswith(EXPORTING_DOCTESTS)
        if marked or (example and refused["exports"]):
            item.add_marker(too_old)
        if not present and item.get_closest_marker("reference"):
            item.add_marker(absent)


@pytest.fixture
def losses() -> dict[str, torch.Tensor]:
    """Inputs of the authors' losses, their values, and the gradient of the first rows."""
    return arrays_in(Path(__file__).parent / "data" / "losses.npz")
