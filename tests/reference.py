"""What the authors' code computed.

The numbers of their losses are in `tests/data/losses.npz` (48 rows, gradients of 24). Trained
networks and data sets are not part of the repository: tests that read them carry
`@pytest.mark.reference`, and are skipped where the files are absent.
"""

from pathlib import Path

import numpy as np
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
REFERENCE = SHARED / "reference"
DATA = SHARED / "data"


def arrays_in(path: Path) -> dict[str, torch.Tensor]:
    """Every array of an `.npz` file."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def resnet32_arrays() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and outputs of the authors' ResNet-32, and its state dict under their names."""
    arrays = arrays_in(REFERENCE / "resnet32.npz")
    state = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    return arrays, state
