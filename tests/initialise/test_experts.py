"""Fresh weights, copied weights, and what happens to frozen ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from ride_plugin import RIDEWrapper
from ride_plugin._initialise import (
    break_tie,
    has_orthogonal_rows,
    is_sparse,
    redraw,
    reinitialise,
    renew_classifier,
)
from ride_plugin._initialise._draw import shuffled
from ride_plugin._split._copying._copies import clone_module

from ..backbones import CifarResNet, mlp


def test_fresh_experts_differ_and_keep_the_spread() -> None:
    backbone = CifarResNet(n=1)
    with torch.no_grad():
        backbone.layer3[0].bn2.weight.zero_()  # zero-initialised gain: a constant
    model = RIDEWrapper(backbone, 3)
    name = "layer2.0.conv1.weight"
    weights = [expert.get_parameter(name) for expert in model.experts]
    original = backbone.get_parameter(name)
    for weight in weights:
        assert not torch.equal(weight, original)
        torch.testing.assert_close(weight.sort().values.std(), original.std(), rtol=1e-4, atol=0)
    assert not torch.equal(weights[0], weights[1])
    assert all((e.layer3[0].bn2.weight == 0).all() for e in model.experts)
    assert torch.equal(model.trunk.conv1.weight, backbone.conv1.weight)


def test_orthogonal_weights_stay_orthogonal() -> None:
    backbone = mlp()
    nn.init.orthogonal_(backbone[4].weight)
    model = RIDEWrapper(backbone, 2)
    weight = model.experts[1].get_parameter("4.weight")
    assert not torch.equal(weight, backbone[4].weight)
    torch.testing.assert_close(weight @ weight.t(), torch.eye(32), atol=1e-5, rtol=0)


def test_weights_that_cannot_be_redrawn_are_named() -> None:
    backbone = mlp()
    nn.init.eye_(backbone[4].weight)
    with pytest.warns(UserWarning, match=r"4\.weight"):
        model = RIDEWrapper(backbone, 2)
    assert torch.equal(model.experts[1].get_parameter("4.weight"), torch.eye(32))


def test_copy_keeps_weights_and_renews_classifiers() -> None:
    backbone = CifarResNet(n=1)
    backbone(torch.randn(4, 3, 32, 32))
    model = RIDEWrapper(backbone, 2, init="copy")
    for expert in model.experts:
        assert torch.equal(expert.layer3[0].conv1.weight, backbone.layer3[0].conv1.weight)
        assert torch.equal(expert.layer3[0].bn1.running_var, backbone.layer3[0].bn1.running_var)
    heads = [head.weight for head in model.classifiers]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], backbone.linear.weight)


def test_zero_classifiers_do_not_stay_equal() -> None:
    backbone = mlp()
    nn.init.zeros_(backbone[-1].weight)
    first, second = (head.weight for head in RIDEWrapper(backbone, 2).classifiers)
    assert not torch.equal(first, second)
    assert first.abs().max() < 0.1


def test_frozen_parameters_keep_their_values() -> None:
    backbone = CifarResNet(n=1)
    kept = backbone.layer3[0].conv1.weight.requires_grad_(False)
    model = RIDEWrapper(backbone, 2)
    for expert in model.experts:
        assert torch.equal(expert.layer3[0].conv1.weight, kept)
        assert not expert.layer3[0].conv1.weight.requires_grad
        assert not torch.equal(expert.layer3[0].conv2.weight, backbone.layer3[0].conv2.weight)


def test_frozen_parameters_of_narrower_layers_warn() -> None:
    backbone = CifarResNet(n=1)
    backbone.layer3[0].conv1.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"layer3\.0\.conv1\.weight.*Unfreeze"):
        RIDEWrapper(backbone, 2, expert_width=0.75)


def test_frozen_parameters_that_keep_their_size_do_not_warn_beside_narrower_ones() -> None:
    backbone = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    )
    backbone.register_parameter("nothing", nn.Parameter(torch.empty(0), requires_grad=False))
    backbone[-1].bias = nn.Parameter(torch.randn(5), requires_grad=False)  # one for each class
    model = RIDEWrapper(backbone, 2, fork_at="2", expert_width=0.5)  # warnings are errors
    assert torch.equal(model.experts[1][-1].bias, backbone[-1].bias)


def test_frozen_layers_of_the_trunk_do_not_warn() -> None:
    backbone = CifarResNet(n=1)
    backbone.conv1.requires_grad_(False)
    model = RIDEWrapper(backbone, 2, expert_width=0.75)
    assert torch.equal(model.trunk.conv1.weight, backbone.conv1.weight)


def test_a_frozen_classifier_is_kept_and_shared() -> None:
    backbone = CifarResNet(n=1)
    backbone.linear.requires_grad_(False)
    with pytest.warns(UserWarning, match="Experts 0 and 1 have equal weights"):
        model = RIDEWrapper(backbone, 2, init="copy")
    first, second = model.classifiers
    assert first.weight is second.weight
    assert torch.equal(first.weight, backbone.linear.weight)


@pytest.mark.parametrize("init", ["fresh", "copy"])
def test_experts_without_anything_to_learn_warn(init: str) -> None:
    backbone = mlp().requires_grad_(False)
    with pytest.warns(UserWarning, match="Every parameter behind the fork is frozen"):
        RIDEWrapper(backbone, 2, init=init)


class Weight(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def test_entries_are_shuffled_constants_stay_statistics_are_reset() -> None:
    expert = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        expert[0].bias.fill_(0.25)
        expert[1].running_mean.fill_(3)
    before = clone_module(expert)
    assert reinitialise(expert, keep=set()) == []
    assert not torch.equal(expert[0].weight, before[0].weight)
    flat, old = expert[0].weight.flatten(), before[0].weight.flatten()
    assert torch.equal(flat.sort().values, old.sort().values)
    assert (expert[0].bias == 0.25).all()
    assert (expert[1].running_mean == 0).all()


@pytest.mark.parametrize("shape", [(512, 384), (257, 256), (3, 256, 256), (65535,), (65537,)])
def test_large_parameters_are_shuffled_entry_by_entry(shape: tuple[int, ...]) -> None:
    old = torch.randn(shape)
    first, second = old.clone(), old.clone()
    assert redraw(first)
    assert redraw(second)
    for new in (first, second):
        assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)
    for a, b in ((first, old), (second, old), (first, second)):
        assert float((a == b).float().mean()) < 1e-3
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.03


@pytest.mark.parametrize("renew", [redraw, lambda w: renew_classifier(Weight(w))])
@pytest.mark.parametrize("spreads", [(1.0, 0.02), (0.02, 0.02, 1.0), (0.02, 0.2, 0.02, 0.02)])
def test_weights_of_several_layers_in_one_parameter_keep_their_spreads(spreads, renew) -> None:
    for shape in ((48, 64), (48, 8, 3, 3)):
        old = torch.cat([spread * torch.randn(shape) for spread in spreads])
        weight = nn.Parameter(old.clone())
        with torch.no_grad():
            renew(weight)
        for new, layer in zip(weight.chunk(len(spreads)), old.chunk(len(spreads)), strict=True):
            assert not torch.equal(new, layer)
            assert torch.equal(new.flatten().sort().values, layer.flatten().sort().values)


@pytest.mark.parametrize("shape", [(5, 16), (64, 3, 3, 3), (2, 8)])
@pytest.mark.parametrize("length", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_one_length_keep_it(
    shape: tuple[int, ...], length: float, dtype: torch.dtype
) -> None:
    old = (length * F.normalize(torch.randn(shape).flatten(1)).view(shape)).to(dtype)
    drawn = old.clone()
    assert redraw(drawn)
    assert not torch.equal(drawn, old)
    lengths = drawn.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, length))


def test_signs_stay_signs() -> None:
    drawn = torch.randint(0, 2, (20, 30)).float() * 2 - 1
    assert redraw(drawn)
    assert drawn.abs().eq(1).all()


@pytest.mark.parametrize("entries", [10, 16384, 40000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5625, 1.0, 2.5])
def test_entries_are_drawn_from_all_places_and_none_twice_before_all_are(entries, share) -> None:
    count = int(share * entries)
    drawn = shuffled(torch.arange(entries), count)
    assert len(drawn) == count
    times = torch.bincount(drawn, minlength=entries)
    assert set(times.tolist()) <= {count // entries, -(-count // entries)}
    if 1000 < count < entries:
        assert abs(float(drawn.double().mean()) / entries - 0.5) < 0.05


@pytest.mark.parametrize("size", [20, 300])
def test_a_matrix_most_of_which_is_zero_is_sparse_wherever_the_zeros_are(size: int) -> None:
    matrix = torch.randn(size, size)
    assert not is_sparse(matrix)
    stripes, half, few = matrix.clone(), matrix.clone(), matrix.clone()
    stripes[:, torch.arange(size) % 3 > 0] = 0
    half[: size // 2 + 1] = 0
    few[: size // 3] = 0
    assert all(is_sparse(m) for m in (stripes, half, torch.eye(size)))
    assert not is_sparse(few)


@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.parametrize("padding_idx", [0, 4])
def test_the_row_of_a_padding_index_stays_zero(width: int, padding_idx: int) -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        table = kind(10, width, padding_idx=padding_idx)
        before = table.weight.detach().clone()
        assert reinitialise(table, keep=set()) == []
        others = torch.arange(10) != padding_idx
        assert (table.weight[padding_idx] == 0).all()
        assert not torch.equal(table.weight[others], before[others])
        assert torch.equal(
            table.weight[others].flatten().sort().values, before[others].flatten().sort().values
        )


RECURRENT = {
    "LSTM": (lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=3), 4),
    "GRU": (lambda: nn.GRU(6, 8), 3),
    "RNN": (lambda: nn.RNN(6, 8), 1),
    "LSTMCell": (lambda: nn.LSTMCell(6, 8), 4),
    "GRUCell": (lambda: nn.GRUCell(6, 8), 3),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_are_drawn_gate_by_gate(kind: str) -> None:
    make, gates = RECURRENT[kind]
    layer = make()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            for index, part in enumerate(parameter.chunk(gates)):
                if "hr" not in name:
                    part.add_(10 * index)
                if "bias_ih" in name and index == 1:
                    part.fill_(1.0)  # the forget gate of an LSTM
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    assert reinitialise(layer, keep=set()) == []
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, before[name])
        number = 1 if "hr" in name else gates
        for new, old in zip(parameter.chunk(number), before[name].chunk(number), strict=True):
            assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)


@pytest.mark.parametrize("how", ["as a whole", "by gates"])
def test_orthogonal_recurrent_weights_stay_so(how: str) -> None:
    layer = nn.GRU(8, 8)
    whole = layer.weight_hh_l0
    number = 1 if how == "as a whole" else 3
    with torch.no_grad():
        for part in whole.chunk(number):
            part.copy_(nn.init.orthogonal_(torch.empty_like(part)))
    before = whole.detach().clone()
    assert reinitialise(layer, keep=set()) == []
    assert not torch.equal(whole, before)
    for part in whole.detach().chunk(number):
        torch.testing.assert_close(part.t() @ part, torch.eye(8), atol=1e-5, rtol=0)


class Scan(nn.Module):
    """As state-space models have it: rates that are ranges, and the same for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1, 9.0).repeat(16, 1).log())
        self.D = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (-self.A_log.exp().mean(1)).exp() + x * self.D


def test_values_that_have_their_places_are_left_and_named() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), Scan(), nn.Linear(16, 5))
    with pytest.warns(UserWarning, match=r"seem to have their places.*\['3\.A_log'\]"):
        model = RIDEWrapper(net, 2, fork_at="2")
    for expert in model.experts:
        assert torch.equal(expert[3].A_log, net[3].A_log)
        assert not torch.equal(expert[2].weight, net[2].weight)


def test_a_classifier_whose_rows_resemble_their_neighbours_is_renewed_all_the_same() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 32).repeat(8, 1))

    head = Head()
    renew_classifier(head)
    assert not torch.equal(head.weight, Head().weight)


def test_tied_tensors_are_kept() -> None:
    expert = nn.Linear(6, 5)
    before = expert.weight.clone()
    reinitialise(expert, keep={id(expert.weight)})
    assert torch.equal(expert.weight, before)


def test_a_classifier_without_a_method_of_its_own_gets_its_values_in_another_order() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

    head = Head()
    before = head.weight.detach().clone()
    renew_classifier(head)
    assert not torch.equal(head.weight, before)
    assert torch.equal(head.weight.detach().flatten().sort()[0], before.flatten().sort()[0])


def test_orthogonality_of_very_large_matrices_is_not_looked_for() -> None:
    assert has_orthogonal_rows(torch.eye(64))
    assert not has_orthogonal_rows(torch.eye(4097))


def orthogonal(orthogonal_map: str | None = None, use_trivialization: bool = True):
    def of(layer: nn.Module) -> nn.Module:
        return parametrizations.orthogonal(
            layer, orthogonal_map=orthogonal_map, use_trivialization=use_trivialization
        )

    return of


ORTHOGONAL = {
    "orthogonal": orthogonal(),
    "Cayley": orthogonal("cayley"),
    "reflections": orthogonal("householder", False),
    "Cayley without a basis": orthogonal("cayley", False),
}
COMPUTED = ORTHOGONAL | {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated")
@pytest.mark.parametrize("init", ["fresh", "copy"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_differ_between_experts(kind: str, init: str) -> None:
    compute = COMPUTED[kind]
    net = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), compute(nn.Linear(16, 16)), nn.ReLU(),
        compute(nn.Linear(16, 5)),
    )  # fmt: skip
    net(torch.randn(2, 8))
    model = RIDEWrapper(net, 3, init=init, fork_at="2")
    model(torch.randn(2, 8))  # old hooks compute their weights in a forward
    for name in ("2", "4"):
        weights = [expert.get_submodule(name).weight.detach() for expert in model.experts]
        if name == "4" or init == "fresh":
            assert not torch.equal(weights[0], weights[1])
            assert not torch.equal(weights[0], net.get_submodule(name).weight)
        else:
            assert torch.equal(weights[0], weights[1])
        if kind in ORTHOGONAL:
            identity = torch.eye(len(weights[0]))
            torch.testing.assert_close(weights[1] @ weights[1].t(), identity, atol=1e-5, rtol=0)


def test_a_classifier_keeps_what_is_frozen_and_what_belongs_to_the_trunk() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.late, self.fc = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 5)
            self.fc.weight = nn.Parameter(self.first.weight.detach().t().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.late(torch.relu(self.first(x)))))

    frozen = Tied()
    frozen.fc.weight.requires_grad_(False)  # as simplex classifiers are, beside a bias
    model = RIDEWrapper(frozen, 2, fork_at="late", init="copy")
    for head in model.classifiers:
        assert torch.equal(head.weight, frozen.fc.weight)
        assert not torch.equal(head.bias, frozen.fc.bias)

    head = nn.Linear(16, 5)
    before = head.weight.detach().clone()
    renew_classifier(head, {id(head.weight)})
    assert torch.equal(head.weight, before)


def test_a_tie_is_broken_only_where_every_weight_is_constant() -> None:
    head = parametrizations.weight_norm(nn.Linear(16, 5))
    lengths = head.parametrizations.weight.original0
    with torch.no_grad():
        lengths.fill_(1.0)
    break_tie(head)
    assert (lengths == 1).all()

    frozen = nn.Linear(16, 5)
    with torch.no_grad():
        frozen.weight.fill_(0.5)
    frozen.weight.requires_grad_(False)
    break_tie(frozen)
    assert (frozen.weight == 0.5).all()


class Fourier(nn.Module):
    """As Fourier neural operators have it: complex weights for the lowest frequencies."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = torch.fft.rfft(x)[..., : self.weight.shape[-1]]
        mixed = torch.einsum("bik,iok->bok", modes, self.weight)
        return torch.fft.irfft(mixed, n=x.shape[-1])


def fourier_operator(weight: torch.Tensor) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 16, 1), nn.GELU(), Fourier(weight), nn.GELU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def test_complex_weights_are_drawn_anew() -> None:
    net = fourier_operator(torch.randn(16, 16, 4, dtype=torch.cfloat))
    model = RIDEWrapper(net, 2, fork_at="2", example_input=torch.randn(4, 2, 32))
    first, second = (expert[2].weight for expert in model.experts)
    assert not torch.equal(first, second)
    for weight in (first, second):
        same = [torch.view_as_real(w.detach()).flatten(0, -2) for w in (weight, net[2].weight)]
        torch.testing.assert_close(*(w[w[:, 0].sort().indices] for w in same))


def test_complex_values_that_have_their_places_are_left_and_named() -> None:
    decay = -0.5 + 1j * torch.pi * torch.arange(16)  # as diagonal state-space models have it
    net = fourier_operator(decay.to(torch.cfloat).repeat(16, 16, 1))
    with pytest.warns(UserWarning, match=r"seem to have their places.*\['2\.weight'\]") as caught:
        model = RIDEWrapper(net, 2, fork_at="2", example_input=torch.randn(4, 2, 32))
    assert len(caught) == 1
    assert torch.equal(model.experts[1][2].weight, net[2].weight)


def test_unitary_weights_stay_unitary() -> None:
    weight = torch.linalg.qr(torch.randn(16, 16, dtype=torch.cfloat))[0]
    drawn = weight.clone()
    assert redraw(drawn)
    assert not torch.equal(drawn, weight)
    identity = torch.eye(16, dtype=torch.cfloat)
    torch.testing.assert_close(drawn @ drawn.mH, identity, atol=1e-5, rtol=0)
