"""What several test modules use, and what is skipped where the authors' numbers are absent."""

from pathlib import Path

import pytest
import torch

from tests.reference import DATA, REFERENCE, arrays_in


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (REFERENCE.exists() and DATA.exists()):
        absent = pytest.mark.skip(reason="the authors' numbers are not part of the repository")
        for item in items:
            if item.get_closest_marker("reference"):
                item.add_marker(absent)


@pytest.fixture
def losses() -> dict[str, torch.Tensor]:
    """Inputs of the authors' losses, their values, and the gradient of the first rows."""
    return arrays_in(Path(__file__).parent / "data" / "losses.npz")
