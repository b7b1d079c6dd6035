"""What a pass that is thrown away may change, and how the build compares what passes leave."""

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError
from ride_plugin._split._copies import same_values

NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 0.0], False),
        ([NAN, 0.0], [0.0, NAN], False),
        ([NAN, 1.0], [NAN, 2.0], False),
        ([float("inf")], [torch.finfo(torch.float32).max], False),
        ([complex(1, NAN)], [complex(1, NAN)], True),
        ([complex(1, NAN)], [complex(1, 0)], False),
        ([1.0, 2.0], [1.0], False),
        ([1.0, 2.0], [1, 2], False),
        ([1, 2], [1, 3], False),
    ],
)
def test_nan_equals_nan_and_no_number(a: list[float], b: list[float], same: bool) -> None:
    assert same_values(torch.tensor(a), torch.tensor(b)) is same
    assert same_values(torch.tensor(b), torch.tensor(a)) is same


class CountsBadValues(nn.Module):
    """What the code after the fork stores is read by the trunk in the next step.

    What is stored is NaN from one expert and zero from another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu() + self.last
        x = self.b(x)
        self.last = torch.where(self.b.weight == 0.125, 0.0, NAN).amax(1)
        return self.c(x.relu().nan_to_num())


def test_a_trunk_that_reads_nan_of_one_expert_and_zero_of_another_is_refused() -> None:
    net = CountsBadValues()
    nn.init.constant_(net.b.weight, 0.125)
    with pytest.raises(SplitError, match=r"`last` keeps what.*other values for each expert"):
        RIDEWrapper(net, 2, fork_at="b", init="copy", example_input=torch.randn(2, 6))
