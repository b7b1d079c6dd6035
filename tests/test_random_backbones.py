"""Two hundred random backbones are split, narrowed and routed as the naive model computes.

`python -m benchmarks.random_backbones --number 10000` draws more of them.
"""

import pytest

from benchmarks.random_backbones import check


@pytest.mark.slow
@pytest.mark.parametrize("tens", range(20))
def test_ten_random_backbones(tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        try:
            check(seed)
        except Exception as error:
            error.add_note(f"repeat with: -m benchmarks.random_backbones --first {seed} --number 1")
            raise
