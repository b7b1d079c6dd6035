"""Convolutions with a kernel that no layer owns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.width.test_comparison import narrowed

ROW = torch.tensor([1.0, 2.0, 1.0]) / 4


class Blur(nn.Module):
    """Blurs each channel by itself with a kernel that was repeated for all of them."""

    def __init__(self, channels: int, times: int = 1, fixed: bool = False) -> None:
        super().__init__()
        self.fixed, self.channels = fixed, channels
        kernel = ROW[:, None] * ROW
        self.register_buffer("kernel", kernel.expand(channels * times, 1, 3, 3).clone())
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels * times)))

    def forward(self, x: Tensor) -> Tensor:
        groups = self.channels if self.fixed else x.shape[1]
        return F.conv2d(x, self.kernel, self.bias, padding=1, groups=groups)


@pytest.mark.parametrize("width", [0.5, 0.75])
@pytest.mark.parametrize("times", [1, 2])
def test_a_kernel_with_a_filter_for_each_channel_follows_them(width: float, times: int) -> None:
    expert, channels = narrowed(Blur(32, times), width, 32 * times), round(32 * width)
    assert (expert[2].out_channels, expert[5].in_channels) == (channels, channels * times)
    assert expert[4].bias.shape == (channels * times,)
    x = torch.randn(2, channels, 6, 6)
    kernel = (ROW[:, None] * ROW)[None, None]
    each = [F.conv2d(x[:, k : k + 1], kernel, padding=1) for k in range(channels)]
    torch.testing.assert_close(expert[4](x), torch.cat([e for e in each for _ in range(times)], 1))


def test_what_is_added_to_channels_that_were_blurred_is_as_wide() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blur, self.side = Blur(32), nn.Parameter(torch.zeros(1, 32, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.blur(x) + self.side

    expert = narrowed(Added())
    assert expert[4].blur.kernel.shape[0] == 24 == expert[4].side.shape[1]


def test_a_fixed_number_of_groups_keeps_the_channels() -> None:
    expert = narrowed(Blur(32, fixed=True))
    assert expert[2].out_channels == 32 == expert[4].kernel.shape[0]


class MadeInForward(nn.Module):
    """As many filters as it was built for, whatever arrives."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = (ROW[:, None] * ROW).expand(32, 1, 3, 3)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


class Grouped(nn.Module):
    """Four channels in each group, however many groups there are."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 4, 3, 3) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1] // 4)


@pytest.mark.parametrize("kind", [MadeInForward, Grouped])
def test_channels_are_not_filtered_more_often_than_they_were(kind: type[nn.Module]) -> None:
    assert narrowed(kind(), 0.5)[2].out_channels == 32
