"""What lets the model libraries import beside a CPU torch."""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None


def let_torchvision_import() -> None:
    """Declare two detection operators that torchvision's Python files name, where it lacks them.

    A torchvision built for accelerators cannot load its compiled part beside a CPU torch, and then
    fails to import for want of these declarations. No architecture here uses them. One that fits
    its torch declares them itself, and a second declaration would be an error.
    """
    global _library
    if _library is not None:
        return
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:  # operator torchvision::nms does not exist
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
