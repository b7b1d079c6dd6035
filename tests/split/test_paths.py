"""A call unlike the example: other arguments, masks and flags, in training and routed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import ConfidenceRouter, ReplayError, RIDEWrapper, RoutingInference, expert_logits
from tests.naive import copies_of

X, MASK, ROW, VECTOR = torch.randn(6, 6), torch.rand(6, 8), torch.rand(1, 8), torch.rand(8)


class WithOptions(nn.Module):
    """What arguments decide behind the fork leaves no trace before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.adds = False

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        skip: bool = False,
        mode: str = "plain",
        steps: int = 0,
    ) -> Tensor:
        h = self.a(x).relu()
        early = h * 2
        out = self.b(h)
        if skip:
            out = out + early
        if mode == "twice":
            h += 1
            out = out + h
        if self.adds:
            h += 1
        if steps:
            h += 1
            out = out + h + steps * early
        if mask is not None:
            out = out * mask
        if bias is not None:
            out = out + bias
        return self.fc(out)


CALLS: dict[str, tuple[Any, Any]] = {
    "a mask more": (((X,), {}), ((X, MASK), {})),
    "a mask less": (((X, MASK), {}), ((X,), {})),
    "another argument": (((X,), {"mask": MASK}), ((X,), {"bias": MASK})),
    "one mask for all rows": (((X, MASK), {}), ((X, ROW), {})),
    "a mask for each row": (((X, ROW), {}), ((X, MASK), {})),
    "a mask without rows": (((X, MASK), {}), ((X, VECTOR), {})),
    "a mask with rows": (((X, VECTOR), {}), ((X, MASK), {})),
    "another order": (((), {"x": X, "mask": VECTOR}), ((), {"mask": VECTOR, "x": X})),
    "a flag": (((X,), {}), ((X,), {"skip": True})),
    "a flag less": (((X,), {"skip": True}), ((X,), {})),
    "a word": (((X,), {}), ((X,), {"mode": "twice"})),
    "a number": (((X,), {"steps": 0}), ((X,), {"steps": 3})),
    "a flag in its place": (((X, None, None, False), {}), ((X, None, None, True), {})),
}


def wrap(example: Any) -> tuple[RIDEWrapper, list[nn.Module]]:
    args, kwargs = example
    few = tuple(_two(a) for a in args), {key: _two(value) for key, value in kwargs.items()}
    backbone = WithOptions()
    model = RIDEWrapper(backbone, 3, fork_at="b", example_input=few)
    return model, copies_of(backbone, model)


def _two(value: Any) -> Any:
    rows = isinstance(value, Tensor) and value.shape[0] == len(X)
    return value[:2] if rows else value


@pytest.mark.parametrize("case", CALLS)
def test_training_computes_what_the_copies_compute(case: str) -> None:
    check_training(case, lambda model: model)


@pytest.mark.compiles
@pytest.mark.parametrize("case", ["a mask more", "a word"])
def test_compiled_it_computes_what_the_copies_compute(case: str) -> None:
    check_training(case, lambda model: torch.compile(model, backend="eager"))


def check_training(case: str, made: Callable[[nn.Module], Any]) -> None:
    example, (args, kwargs) = CALLS[case]
    model, copies = wrap(example)
    call = made(model)
    for _ in range(2):
        got = expert_logits(call(*args, **kwargs))
        for index, each in enumerate(copies):
            torch.testing.assert_close(got[:, index], each(*args, **kwargs))


@pytest.mark.parametrize("case", CALLS)
def test_evaluation_and_every_choice_of_rows_are_those_of_the_copies(case: str) -> None:
    example, (args, kwargs) = CALLS[case]
    model, copies = wrap(example)
    model.eval()
    with torch.no_grad():
        wanted = torch.stack([each(*args, **kwargs) for each in copies], dim=1)
        torch.testing.assert_close(expert_logits(model(*args, **kwargs)), wanted)
        state = model.run_trunk(*args, **kwargs)
        for rows in ([3], [5, 1], [0, 2, 4, 5]):
            some = state.select(torch.tensor(rows))
            for index in range(3):
                torch.testing.assert_close(model.run_expert(index, some)[0], wanted[rows, index])
        routed = RoutingInference(model, ConfidenceRouter(), 0.3)
        out = routed(*args, return_routing=True, **kwargs)
        for row, used in enumerate(out.num_experts_used.tolist()):
            torch.testing.assert_close(out.logits[row], wanted[row, :used].mean(0))


def test_states_of_calls_that_differ_are_not_joined() -> None:
    model, _ = wrap(CALLS["a flag"][0])
    model.eval()
    states = [model.run_trunk(X), model.run_trunk(X, skip=True)]
    with pytest.raises(ValueError, match="one path through the backbone"):
        type(states[0]).cat(states)


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_that_begins_to_change_what_others_read_is_told(training: bool) -> None:
    model, _ = wrap(CALLS["a flag"][0])
    model.train(training)
    for part in (model.trunk, *model.experts):
        part.adds = True
    with pytest.raises(ReplayError, match=r"in place what `relu` returned.*example_input="):
        model(X)


def test_a_flag_in_a_dict_of_inputs_is_a_part_of_the_path() -> None:
    class Batches(WithOptions):
        def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
            return super().forward(**batch)

    example = {"x": X[:2], "skip": False}
    model = RIDEWrapper(Batches(), 2, fork_at="b", example_input=(example,)).eval()
    batch = {"x": X, "skip": True}
    with torch.no_grad():
        each = [model.to_module(k)(batch) for k in range(2)]
        torch.testing.assert_close(model(batch), torch.stack(each).mean(0))
