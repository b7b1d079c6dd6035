"""Passes on the meta device: few operations for each layer, and whole numbers keep contents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ride_plugin import RIDEWrapper
from ride_plugin._split._copying._copies import running_copy
from ride_plugin._split._examine._examine import examine
from ride_plugin._split._examine._meta import on_meta
from ride_plugin._tree import tensors_in


def passed(layer: nn.Module, x: Tensor) -> tuple[Tensor, nn.Module]:
    copied = running_copy(layer, (layer,), meta=True)
    with on_meta(x, True) as shapes:
        return copied(shapes), copied


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6)])
def test_batch_normalisation_without_contents_has_the_shape_and_writes_the_same(
    shape: tuple[int, ...], options: dict[str, bool], training: bool
) -> None:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    layer = kind(4, **options).train(training)
    x = torch.randn(shape)
    found, copied = passed(layer, x)
    before = {name: buffer._version for name, buffer in layer.named_buffers()}
    expected = layer(x)
    assert found.is_meta
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    for name, buffer in copied.named_buffers():
        assert (buffer._version > 0) == (layer.get_buffer(name)._version > before[name]), name
    if options == {}:
        asked = (copied.weight, copied.bias)
        gradients = torch.autograd.grad(found.sum(), asked)
        assert [g.shape for g in gradients] == [(4,), (4,)]


class Operations(TorchDispatchMode):
    """Names what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_batch_normalisation_without_contents_is_one_operation(training: bool) -> None:
    original = nn.BatchNorm2d(4).train(training)
    layer = running_copy(original, (original,), meta=True)
    with torch.no_grad(), on_meta(torch.randn(3, 4, 5, 6), True) as shapes, Operations() as seen:
        layer(shapes)
    assert [name for name in seen.names if name not in ("view", "add_")] == ["convolution"]


def test_another_number_of_channels_is_refused_as_with_contents() -> None:
    with pytest.raises(RuntimeError, match="running_mean"):
        passed(nn.BatchNorm2d(4), torch.randn(2, 1, 3, 3))


def test_a_single_value_in_each_channel_is_refused_as_with_contents() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        passed(nn.BatchNorm1d(4), torch.randn(1, 4))


LAYERS = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(2, 3, 4), (5, 4), (5,)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 3, 4), (4,), (4,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3, 3), (4,), (4,)]),
    "gelu": (F.gelu, [(2, 3, 4)]),
    "relu": (F.relu, [(2, 3, 4)]),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 2.0), [(2, 3, 4)]),
    "dropout": (lambda x: F.dropout(x, 0.2, True), [(2, 3, 4)]),
    "add": (lambda x, y: x + y, [(2, 3, 4), (2, 3, 4)]),
    "add a number": (lambda x: torch.add(x, 1, alpha=2), [(2, 3, 4)]),
    "add, spread": (lambda x, y: x + y, [(2, 3, 4), (4,)]),
    "attention": (F.scaled_dot_product_attention, [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_contents_have_the_shape_and_depend_on_the_same(name: str) -> None:
    layer, shapes = LAYERS[name]
    real = [torch.randn(shape, requires_grad=True) for shape in shapes]
    hollow = [tensor.detach().to("meta").requires_grad_() for tensor in real]
    expected = layer(*real)
    with on_meta((), True), Operations() as seen:
        found = layer(*hollow)
    assert (found.is_meta, found.shape, found.dtype) == (True, expected.shape, expected.dtype)
    gradients = torch.autograd.grad(found.sum(), hollow)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in real]
    moved = ("view", "t", "transpose", "expand", "_unsafe_view", "clone", "detach")
    assert len([name for name in seen.names if name not in moved]) <= 3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}, {"bias": False}],
    ids=["plain", "bidirectional", "without bias"],
)
def test_recurrent_layers_without_contents_are_not_unrolled(kind, options) -> None:
    layer, x = kind(6, 8, **options), torch.randn(50, 3, 6)
    copied = running_copy(layer, (layer,), meta=True)
    with on_meta(x, True) as shapes, Operations() as seen:
        found = list(tensors_in(copied(shapes)))
    assert [tensor.shape for tensor in found] == [t.shape for t in tensors_in(layer(x))]
    assert len(seen.names) < 60  # a step has a dozen
    for tensor in found:
        gradients = torch.autograd.grad(tensor.sum(), copied.parameters(), retain_graph=True)
        assert len(gradients) == len(list(layer.parameters()))
    with pytest.raises(RuntimeError), on_meta(torch.randn(50, 3, 7), True) as wrong:
        copied(wrong)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (lambda x, w, b: F.linear(x, w, b), [(2, 4), (5, 3), (5,)]),
        (lambda x, w, b: F.linear(x, w, b), [(2, 4), (5, 4), (4,)]),
        (lambda x, w, b: F.linear(x, w, b), [(2, 3), (5, 4), (5,)]),
        (lambda x, w, b: F.group_norm(x, 3, w, b), [(2, 4, 3, 3), (4,), (4,)]),
        (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3, 3), (2,), (2,)]),
        (lambda x, y: x + y, [(2, 3), (2, 4)]),
        (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 5), (4,), (4,)]),
        (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(2, 4), (1,), (1,)]),
        (F.scaled_dot_product_attention, [(2, 2, 3, 4), (2, 2, 5, 3), (2, 2, 5, 4)]),
    ],
)
def test_layers_that_do_not_fit_are_refused_as_with_contents(layer, shapes) -> None:
    for device in ("cpu", "meta"):
        tensors = [torch.randn(shape, device=device) for shape in shapes]
        with pytest.raises(RuntimeError), on_meta((), True):
            layer(*tensors)


@pytest.mark.parametrize("layer", [nn.ReLU(True), nn.Dropout(0.2, True), nn.LeakyReLU(0.1, True)])
def test_what_is_changed_in_place_is_changed_in_place_without_contents_too(layer) -> None:
    x = torch.randn(2, 3)
    with on_meta(x, True) as shapes:
        before = shapes._version
        assert layer(shapes) is shapes
    assert shapes._version > before


class Masked(nn.Module):
    """As text models do: one way if a mask hides nothing, another if it hides something."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.hidden, self.ways = hidden, []

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        mask = mask.to(device=x.device, dtype=torch.bool)
        self.ways.append("all" if mask.all() else "some")
        if not mask.all():
            x = x * mask.unsqueeze(-1)
        return self.head(self.body(x).relu().mean(1))


@pytest.mark.parametrize("hidden", [False, True])
def test_decisions_by_whole_numbers_are_made_on_the_meta_device_too(hidden: bool) -> None:
    net, mask = Masked(hidden).eval(), torch.ones(2, 6).long()
    mask[1, 4:] = 0 if hidden else 1
    ids = torch.randint(9, (2, 6))
    assert examine(net, (ids, mask)).by_shapes
    copied = running_copy(net, (net,), meta=True)
    with on_meta((ids, mask), True) as inputs:
        found = copied(*inputs)
    assert found.is_meta
    assert found.shape == (2, 5)
    assert copied.ways == ["some" if hidden else "all"]
    model = RIDEWrapper(net, 1, example_input=(ids, mask)).eval()
    torch.testing.assert_close(model(ids, mask), net(ids, mask))


@pytest.mark.parametrize(
    "lost",
    [
        lambda ids, x: torch.zeros_like(ids, dtype=x.dtype, device="cpu").copy_(x),
        lambda ids, x: ids.__setitem__(0, x[0].long()),
        lambda ids, x: torch.sub(ids, x.long(), out=ids),
        lambda ids, x: ids.view_as(x).add_(1),
    ],
)
def test_what_would_be_lost_between_the_devices_is_refused(lost) -> None:
    ids, x = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, device="meta")
    with pytest.raises(NotImplementedError, match="contents"), on_meta((), True):
        lost(ids, x)


class Collected(nn.Module):
    """Writes what it computes into a tensor that it makes beside its whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        rows = torch.zeros(*ids.shape, 8, device=ids.device)
        rows[:, :] = self.embedding(ids)
        return self.head(rows.mean(1))


def test_a_backbone_that_writes_between_the_devices_is_split_by_its_contents() -> None:
    net, ids = Collected().eval(), torch.randint(9, (4, 6))
    model = RIDEWrapper(net, 2, fork_at="head", example_input=ids, init="copy").eval()
    state = model.run_trunk(ids)
    torch.testing.assert_close(model(state), model(ids))
    part = model(state.select(torch.tensor([2, 0])))
    torch.testing.assert_close(part, model(ids)[[2, 0]])
    model(ids).sum().backward()
    assert model.trunk.embedding.weight.grad.abs().sum() > 0
