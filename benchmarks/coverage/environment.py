"""What lets the model libraries import beside a CPU torch."""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None


def let_torchvision_import() -> None:
    """Declare two detection operators that torchvision's Python files name.

    A torchvision built for accelerators cannot load its compiled part beside a CPU torch, and then
    fails to import for want of these declarations. No architecture here uses them.
    """
    global _library
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
