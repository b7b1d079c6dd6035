"""What a build tries to tell whether an expert's logits for a row depend on the other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, SplitError, expert_logits
from ride_plugin._split._verify import _check_rows


class Chooses(nn.Module):
    """Columns, or periods of a series, are chosen behind the fork: of all rows, or of each."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        kept = torch.zeros_like(x)
        if self.how == "columns of all rows":
            top = x.abs().mean(0).topk(2).indices.tolist()
            kept[:, top] = x[:, top]
        elif self.how == "columns of each row":
            top = x.abs().topk(2).indices
            kept.scatter_(1, top, x.gather(1, top))
        else:  # as TimesNet does: x is [B, T, 8]
            power = torch.fft.rfft(x, dim=1).abs()
            each = power.mean(2) if self.how == "periods of each row" else power.mean((0, 2))[None]
            top = each[:, 1:].topk(2).indices.expand(len(x), -1) + 1
            kept = x.cumsum(1).gather(1, top[:, :, None].expand(-1, -1, 8)).mean(1)
        return self.fc(kept)

    def example(self) -> Tensor:
        if self.how.startswith("columns"):
            return torch.randn(4, 8)
        return torch.randn(4, 24, 8).cumsum(1)  # so smooth that all rows have the same periods


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("what", ["columns", "periods"])
def test_a_choice_made_of_all_rows_is_refused_and_one_of_each_row_is_not(
    what: str, seed: int
) -> None:
    torch.manual_seed(seed)
    net = Chooses(f"{what} of all rows")
    with pytest.raises(SplitError, match=r"depends on the rows that come with it"):
        RIDEWrapper(net, 2, fork_at="b", example_input=net.example())
    net = Chooses(f"{what} of each row")
    model = RIDEWrapper(net, 2, fork_at="b", example_input=net.example()).eval()
    x, rows = net.example(), torch.tensor([3, 1])
    logits, _ = model.run_expert(1, model.run_trunk(x).select(rows))
    torch.testing.assert_close(logits, expert_logits(model(x))[rows, 1])


class Attends(nn.Module):
    """Attention over padding up to the longest row, or not beyond the row's own end."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks = masks
        self.embed, self.q, self.fc = nn.Embedding(9, 8), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1)
        x = self.embed(tokens)
        scores = self.q(x)[:, : int(lengths.max()), 0]
        if self.masks:
            places = torch.arange(scores.shape[1])
            scores = scores.masked_fill(places >= lengths[:, None], float("-inf"))
        weights = scores.softmax(1)[:, :, None]
        return self.fc((weights * x[:, : scores.shape[1]]).sum(1))


def test_the_longest_row_is_noticed_whichever_row_is_the_shortest() -> None:
    tokens = torch.randint(1, 9, (3, 12))
    tokens[:, 9:] = 0
    tokens[1, 5:] = 0
    with pytest.raises(SplitError, match=r"depends on the rows.*the longest of the batch"):
        RIDEWrapper(Attends(False), 2, fork_at="q", example_input=tokens)
    RIDEWrapper(Attends(True), 2, fork_at="q", example_input=tokens)


class Categories(Chooses):
    """Behind the fork reads numbers of the input that are categories, and one that is positive."""

    def __init__(self) -> None:
        super().__init__("")
        self.embed = nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        category, positive = x[:, 0], self.a(x).exp()
        y = self.b(x)
        assert bool((positive > 0).all())
        return self.fc(y + self.embed(category.long()) + positive.log())


def test_values_that_are_tried_stay_within_their_bounds() -> None:
    x = torch.randn(4, 8)
    x[:, 0] = torch.tensor([0.0, 4.0, 1.0, 2.0])
    model = RIDEWrapper(Categories(), 2, fork_at="b", example_input=x).eval()
    state = model.run_trunk(x[:3]).select(torch.tensor([1, 1, 1]))
    tried = _check_rows.with_extremes(state, 1, 0)
    assert tried.values[0] is state.values[0]
    changed = 0
    for got, given in zip(tried.values[1:], state.values[1:], strict=True):
        if given.isnan().all():  # nobody reads it
            continue
        assert torch.equal(got[1], given[1])
        assert set(got.flatten().tolist()) <= set(given.flatten().tolist())
        changed += not torch.equal(got, given)
    assert changed


def test_nothing_more_is_tried_where_an_expert_chooses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def called(*_: Any) -> bool:
        raise AssertionError

    monkeypatch.setattr(_check_rows, "_others_matter", called)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    RIDEWrapper(net, 2, fork_at="1", example_input=torch.randn(4, 8))
