"""Numbers computed by the authors' code; tests that need them skip where they are absent."""

from pathlib import Path

import numpy as np
import pytest
import torch

_LOSSES = Path(__file__).resolve().parents[2] / "shared" / "reference" / "losses.npz"


@pytest.fixture
def losses() -> dict[str, torch.Tensor]:
    if not _LOSSES.exists():
        pytest.skip("reference numbers are not part of the repository")
    with np.load(_LOSSES) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
