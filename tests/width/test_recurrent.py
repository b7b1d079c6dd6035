"""Recurrent layers and cells are narrowed gate by gate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import RIDEWrapper, expert_logits
from ride_plugin._width._recurrent import recurrent_of

LAYERS = {
    "lstm": lambda: nn.LSTM(16, 24, batch_first=True),
    "gru": lambda: nn.GRU(16, 24, 2, batch_first=True, bias=False),
    "rnn": lambda: nn.RNN(16, 24, batch_first=True),
    "lstm of two layers and directions": lambda: nn.LSTM(16, 24, 2, True, True, bidirectional=True),
}


class Sequences(nn.Module):
    """Words, a recurrent layer, its last output and the maximum over time."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        features = 4 * layer.hidden_size if layer.bidirectional else 2 * layer.hidden_size
        self.embedding, self.layer, self.fc = nn.Embedding(40, 16), layer, nn.Linear(features, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.layer(self.embedding(tokens))
        return self.fc(torch.cat([x[:, -1], x.amax(1)], 1))


class Cells(nn.Module):
    """Cells in a loop; the first one's state begins with as many zeros as `width` says."""

    def __init__(self, cell: type[nn.RNNCellBase], width: int | None) -> None:
        super().__init__()
        self.embedding, self.width = nn.Embedding(40, 16), width
        self.two_states = cell is nn.LSTMCell
        self.first, self.second, self.fc = cell(16, 24), cell(24, 24), nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        state = other = None
        if self.width is not None:
            state = torch.zeros(len(tokens), self.width)
            state = (state, state) if self.two_states else state
        for step in self.embedding(tokens).unbind(1):
            state = self.first(step, state)
            hidden = state[0] if isinstance(state, tuple) else state
            other = self.second(hidden, other)
        return self.fc(other[0] if isinstance(other, tuple) else other)


def narrowed(net: nn.Module, fork_at: str) -> RIDEWrapper:
    torch.manual_seed(0)
    tokens = torch.randint(40, (3, 7))
    model = RIDEWrapper(net, 2, fork_at=fork_at, expert_width=0.75, example_input=tokens)
    with torch.no_grad():
        logits = expert_logits(model.eval()(tokens))
        for index in range(2):
            torch.testing.assert_close(model.to_module(index).eval()(tokens), logits[:, index])
    copies = [expert.state_dict() for expert in model.experts]
    assert all(not torch.equal(copies[0][key], copies[1][key]) for key in copies[0])
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_a_recurrent_layer_is_narrowed(name: str) -> None:
    layer = LAYERS[name]()
    model = narrowed(Sequences(layer), "layer")
    found = model.to_module(1).layer
    assert (found.input_size, found.hidden_size) == (16, layer.hidden_size * 3 // 4)
    # The same layer made anew has the same shapes, and computes the same with these weights.
    sizes = {"num_layers": layer.num_layers, "bias": layer.bias, "batch_first": True}
    fresh = type(layer)(16, found.hidden_size, bidirectional=layer.bidirectional, **sizes)
    fresh.load_state_dict(found.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(found(x)[0], fresh(x)[0])


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("width", [None, 24])
def test_a_state_of_a_fixed_width_keeps_its_cell_and_no_other(cell, width: int | None) -> None:
    expert = narrowed(Cells(cell, width), "first").to_module(1)
    assert expert.first.hidden_size == (width or 18)
    assert (expert.second.input_size, expert.second.hidden_size) == (width or 18, 18)
    assert expert.fc.in_features == 18


def test_a_recurrent_layer_on_the_trunk_s_width_takes_it_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), Last(nn.GRU(16, 16)), nn.Linear(16, 5))
    model = RIDEWrapper(net, 2, fork_at="2", expert_width=0.75, example_input=torch.rand(2, 4, 6))
    assert model.to_module(0)[2].layer.input_size == 16


class Last(nn.Module):
    """The trunk's stream plus a layer's output, which has to be as wide; then the last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.into, self.layer = nn.Linear(16, 64), layer
        self.out = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        return (x + self.out(self.into(x).relu()))[:, -1]


def test_gates_keep_what_sets_them_apart() -> None:
    layer = nn.LSTM(16, 24, batch_first=True)
    with torch.no_grad():
        for bias in (layer.bias_ih_l0, layer.bias_hh_l0):
            bias.zero_()
        layer.bias_ih_l0[24:48] = 1.0  # the forget gate's
        for gate in layer.weight_hh_l0.chunk(4):
            nn.init.orthogonal_(gate)
    tokens = torch.randint(40, (3, 7))
    with pytest.warns(UserWarning, match="Not drawn anew"):  # as at full width
        model = RIDEWrapper(
            Sequences(layer), 2, fork_at="layer", expert_width=0.75, example_input=tokens
        )
    for k in range(2):
        found = model.to_module(k).layer
        assert found.bias_ih_l0.tolist() == [0.0] * 18 + [1.0] * 18 + [0.0] * 36
        for gate in found.weight_hh_l0.chunk(4):
            torch.testing.assert_close(gate @ gate.T / (gate @ gate.T)[0, 0], torch.eye(18))


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch's own, without oneDNN
def test_a_layer_that_projects_its_states_keeps_its_width() -> None:
    assert recurrent_of(nn.Linear(16, 24)) is None
    net = Sequences(nn.LSTM(16, 24, batch_first=True, proj_size=12))
    net.fc = nn.Sequential(nn.Linear(24, 400), nn.ReLU(), nn.Linear(400, 5))
    tokens = torch.randint(40, (3, 7))
    model = RIDEWrapper(net, 2, fork_at="layer", expert_width=0.75, example_input=tokens)
    expert = model.to_module(1)
    assert (expert.layer.hidden_size, expert.fc[0].out_features) == (24, 296)
