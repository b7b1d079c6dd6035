"""The cosine classifier that margin losses need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin._errors import ArgumentError
from ride_plugin._numerics import without_autocast


class CosineClassifier(nn.Module):
    r"""Linear classifier on the sphere: scale times the cosine between feature and class weight.

    $\text{logit}_c = s \, \frac{w_c^\top x}{\lVert w_c \rVert \lVert x \rVert}$, as the LDAM paper
    (Cao et al., NeurIPS 2019, section 3.2) and the authors' RIDE use it, with $s = 30$.

    Args:
        in_features: size of a feature, ``D``.
        num_classes: number of classes, ``C``.
        scale: the factor $s$; logits lie in ``[-scale, scale]``.

    Example:
        >>> head = CosineClassifier(8, 5)
        >>> bool(head(torch.randn(2, 8)).abs().max() <= 30.001)
        True
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ArgumentError(f"Expected argument `scale` to be positive, but got {scale}.")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions uniformly; only they matter."""
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[..., D]`` to logits ``[..., C]``, in float32 also under autocast.

        Times 30, a cosine rounded to bfloat16 would move logits by a tenth.
        """
        with without_autocast(features):
            if features.dtype != self.weight.dtype:  # what autocast made of them
                features = features.to(self.weight.dtype)
            directions = F.normalize(features, dim=-1), F.normalize(self.weight, dim=1)
            return self.scale * F.linear(*directions)

    def extra_repr(self) -> str:
        """Sizes, as other layers print them."""
        num_classes, in_features = self.weight.shape
        return f"in_features={in_features}, num_classes={num_classes}, scale={self.scale}"
