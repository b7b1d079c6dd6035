"""Inputs as users hand them over, and batches of other sizes made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ride_plugin import ArgumentError
from ride_plugin._inputs import Inputs, as_inputs, batch_size_of, resize_batch


def test_forms() -> None:
    x = torch.rand(2, 3)
    assert as_inputs(x) == ((x,), {})
    assert as_inputs((x, 1)) == ((x, 1), {})
    assert as_inputs({"x": x}) == ((), {"x": x})
    with pytest.raises(ArgumentError, match="`example_input`"):
        as_inputs("x")


def test_rows_are_repeated_and_varied() -> None:
    x, ids, scale = torch.rand(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor(2.0)
    (got, got_ids, got_scale), _ = resize_batch(((x, ids, scale), {}), 5)
    assert torch.equal(got[:2], x)
    assert len(got.unique(dim=0)) == 5
    assert got_ids.shape == (5, 3)
    assert set(got_ids.flatten().tolist()) == set(ids.flatten().tolist())
    assert got_scale is scale
    (few, rest, _), _ = resize_batch(((x, ids, scale), {}), 3, 1)
    assert torch.equal(few[0], x[0])
    assert len(few.unique(dim=0)) == 3
    assert set(rest.flatten().tolist()) == {1, 2, 3}


@pytest.mark.parametrize(
    ("inputs", "kinds"),
    [(((np.zeros((2, 3)),), {}), "ndarray"), (((), {}), "nothing"), (((), {"x": [1]}), "list")],
)
def test_a_call_without_a_tensor_is_not_told_of_the_example(inputs: Inputs, kinds: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^Expected the arguments of the call .* got {kinds}"):
        batch_size_of(inputs)
    with pytest.raises(ArgumentError, match=rf"^Expected argument `example_input` .* got {kinds}"):
        resize_batch(inputs, 2)
