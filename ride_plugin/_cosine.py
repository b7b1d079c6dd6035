"""The cosine classifier that margin losses need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ride_plugin._checks import check_integer, check_number
from ride_plugin._numerics import float32_or_better, without_autocast


class CosineClassifier(nn.Module):
    r"""Linear classifier on the sphere: scale times the cosine between feature and class weight.

    $\text{logit}_c = s \, \frac{w_c^\top x}{\lVert w_c \rVert \lVert x \rVert}$, as the LDAM paper
    (Cao et al., NeurIPS 2019, section 3.2) and the authors' RIDE use it, with $s = 30$.

    Args:
        in_features: size of a feature, ``D``.
        num_classes: number of classes, ``C``.
        scale: the factor $s$; logits lie in ``[-scale, scale]``.

    Raises:
        ArgumentError: a size is below one, or ``scale`` is not positive and finite.

    Example:
        >>> head = CosineClassifier(8, 5)
        >>> bool(head(torch.randn(2, 8)).abs().max() <= 30.001)
        True
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        in_features = check_integer(in_features, "in_features", 1)
        num_classes = check_integer(num_classes, "num_classes", 1)
        self.scale = check_number(scale, "scale", 0, open_low=True)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw directions uniformly; only they matter."""
        nn.init.normal_(self.weight)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[..., D]`` to logits ``[..., C]``, in float32 also under autocast.

        Times 30, a cosine rounded to bfloat16 would move logits by a tenth. In a model that
        was cast to half precision, they are computed in float32 and rounded once, at the end.
        """
        with without_autocast(features):
            dtype = self.weight.dtype
            # The squares in a norm overflow in half precision, and 0 / 0 is no direction.
            precise = [float32_or_better(part.to(dtype)) for part in (features, self.weight)]
            directions = [F.normalize(part, dim=-1) for part in precise]
            return (self.scale * F.linear(*directions)).to(dtype)

    def extra_repr(self) -> str:
        """Sizes, as other layers print them."""
        num_classes, in_features = self.weight.shape
        return f"in_features={in_features}, num_classes={num_classes}, scale={self.scale}"
