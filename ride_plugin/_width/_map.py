"""One map from old to new widths, so that widths that were equal stay equal."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ride_plugin._width._attention import attention_of

_GRAIN = 8  # wide layers stay multiples of this, as kernels like them


class WidthMap:
    """``w(c)``: the width nearest to ``ratio * c`` that every layer of width ``c`` can take.

    A grouped convolution, a group norm or attention with ``c = groups * size`` channels needs a
    new width that keeps the size of each group, or their number with more than one channel in
    each: a norm of one value is zero. From 64 channels on, multiples
    of eight stay multiples of eight; below, even widths stay even. CIFAR ResNet-32 at 0.75: 32 ->
    24 and 64 -> 48; ResNet-50: 256 -> 192 and 512 -> 384, as the authors have them.

    Args:
        ratio: in ``(0, 1]``.
        groupings: ``(groups, size)`` of each user.
    """

    def __init__(self, ratio: float, groupings: Iterable[tuple[int, int]]) -> None:
        self.ratio = ratio
        self._groupings: dict[int, set[tuple[int, int]]] = {}
        for groups, size in groupings:
            self._groupings.setdefault(groups * size, set()).add((groups, size))

    def __call__(self, width: int) -> int:
        """Return the new width for ``width`` channels."""
        if self.ratio == 1.0 or width < 2:
            return width
        wanted = width * self.ratio
        grain = _GRAIN if width >= 64 and width % _GRAIN == 0 else 1 + (width % 2 == 0)
        groupings = self._groupings.get(width, set())
        # A width of one would broadcast where it should not fit; so it is never chosen.
        for step in (grain, 1):
            fitting = [
                new
                for new in range(max(2, step), width + 1, step)
                if all(
                    new % size == 0 or new % groups == 0 < new - groups
                    for groups, size in groupings
                )
            ]
            if fitting and min(abs(new - wanted) for new in fitting) <= 0.15 * width:
                return min(fitting, key=lambda new: (abs(new - wanted), new))
        return max(2, round(wanted))


def groupings_of(expert: nn.Module) -> list[tuple[int, int]]:
    """``(groups, size)`` of grouped convolutions, group norms and attention in an expert."""
    found: list[tuple[int, int]] = []
    for module in expert.modules():
        groups, channels = 1, 0
        if isinstance(module, nn.modules.conv._ConvNd):
            groups, channels = module.groups, module.in_channels
            if groups == channels:
                continue  # depthwise: one group for each channel, whatever their number
        elif isinstance(module, nn.GroupNorm):
            groups, channels = module.num_groups, module.num_channels
        elif (attention := attention_of("", module)) is not None:
            groups, channels = attention.num_heads, attention.num_heads * attention.head_dim
        if groups > 1 and channels % groups == 0:
            found.append((groups, channels // groups))
    return found
