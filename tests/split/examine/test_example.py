"""Example inputs guessed from a backbone's first layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ride_plugin import (
    ArgumentError,
    ConfidenceRouter,
    RIDEWrapper,
    RoutingInference,
    SplitError,
)
from ride_plugin._split._examine._example import find_example
from ride_plugin._split._examine._logits import LogitsReader


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), (2, 784)),
        (
            nn.Sequential(
                nn.Conv1d(4, 8, 9), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5)
            ),
            (2, 4, 64),
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 5)),
            (2, 1, 28, 28),
        ),
        (nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(128, 5)), (2, 16)),
    ],
)
def test_inputs_are_guessed_from_the_first_layer(backbone, shape) -> None:
    ((x,), kwargs), _ = find_example(backbone.eval(), None, LogitsReader())
    assert tuple(x.shape) == shape
    assert not kwargs


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Pixels(nn.Module):
    """Flattens images of a known number of pixels itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.head = nn.Linear(channels * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (self.channels, 8, 8)
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.Flatten(), nn.LazyLinear(5)), (2, 2, 8, 32, 32)),
        (LastState(), (2, 16, 6)),
        (Pixels(1), (2, 1, 8, 8)),
        (Pixels(3), (2, 3, 8, 8)),
        (nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 5)), (2, 7)),
        (nn.Sequential(nn.BatchNorm1d(7), nn.Flatten(), nn.Linear(7 * 64, 5)), (2, 7, 64)),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 32 * 32, 5)),
            (2, 3, 32, 32),
        ),
    ],
)
def test_other_first_layers(backbone: nn.Module, shape: tuple[int, ...]) -> None:
    if isinstance(backbone, nn.Sequential):
        backbone(torch.randn(shape))  # gives the lazy layer its size
    ((x,), kwargs), _ = find_example(backbone.eval(), None, LogitsReader())
    assert tuple(x.shape) == shape
    assert not kwargs


class Configured(nn.Module):
    """Takes its input by name and has a configuration, as models of transformers do."""

    def __init__(self, name: str, shape: tuple[int, ...], **config: object) -> None:
        super().__init__()
        self.main_input_name, self.shape = name, shape
        self.config = SimpleNamespace(**config)
        self.head = nn.Linear(1, 5)

    def forward(self, **inputs: Tensor) -> Tensor:
        x = inputs[self.main_input_name]
        assert tuple(x.shape[1:]) == self.shape
        return self.head(x.float().flatten(1).mean(1, keepdim=True))


@pytest.mark.parametrize(
    "backbone",
    [
        Configured("input_ids", (16,), vocab_size=30),
        Configured("input_ids", (16,), vocab_size=None),
        Configured("pixel_values", (3, 64, 64), image_size=64),
        Configured("pixel_values", (1, 32, 48), image_size=(32, 48), num_channels=1),
        Configured("pixel_values", (3, 336, 336), vision_config=SimpleNamespace(image_size=336)),
        Configured("pixel_values", (3, 224, 224), image_size={"shortest_edge": 32}),
        Configured("pixel_values", (4, 3, 32, 32), image_size=32, num_frames=4),
        Configured("pixel_values", (4, 3, 32, 48), image_size=[32, 48], num_frames=4),
        Configured(
            "pixel_values_videos", (2, 1, 48, 48), crop_size=48, frames_per_clip=2, num_channels=1
        ),
        Configured("input_values", (100, 20), max_length=100, num_mel_bins=20),
        Configured("input_values", (16000,)),
        Configured("input_features", (20, 128), max_source_positions=64, num_mel_bins=20),
        Configured("input_features", (64, 20), max_source_positions=64, num_mel_bins=20),
    ],
    ids=lambda backbone: f"{backbone.main_input_name}{list(backbone.shape)}",
)
def test_a_configuration_says_what_the_input_is(backbone: Configured) -> None:
    (args, kwargs), _ = find_example(backbone, None, LogitsReader())
    assert not args
    assert tuple(kwargs[backbone.main_input_name].shape) == (2, *backbone.shape)


class EndsInToken(nn.Module):
    """Classifies what stands at the token that ends each text, of which each needs one."""

    main_input_name = "input_ids"

    def __init__(self, end: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=30, eos_token_id=end)
        self.table, self.late, self.fc = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        is_end = input_ids == self.config.eos_token_id
        if not bool((is_end.sum(1) == 1).all()):
            raise ValueError("Each example needs exactly one end token.")
        hidden = torch.relu(self.late(self.table(input_ids).cumsum(1)))
        return self.fc(hidden[is_end])


@pytest.mark.parametrize("end", [0, 2, 29])
def test_texts_that_need_a_token_at_their_end_are_guessed(end: int) -> None:
    (_, kwargs), output = find_example(EndsInToken(end).eval(), None, LogitsReader())
    assert (kwargs["input_ids"] == end).nonzero().tolist() == [[0, 15], [1, 15]]
    assert output.shape == (2, 5)


def test_a_pretrained_card_says_what_the_input_is() -> None:
    backbone = Pixels(3)
    backbone.pretrained_cfg = {"input_size": (3, 8, 8)}
    ((x,), _), _ = find_example(backbone, None, LogitsReader())
    assert tuple(x.shape) == (2, 3, 8, 8)


class TwoEncoders(nn.Module):
    """An image classifier that holds a text encoder first, as fine-tuned CLIP models do."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.position = nn.Parameter(torch.randn(16, 8))
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position  # 32 pixels wide alone
        return self.head(self.block(x).relu().mean(1))


def test_a_part_that_is_not_called_does_not_mislead() -> None:
    model = RIDEWrapper(TwoEncoders(), 2, fork_at="block")
    assert model.example_input(2)[0][0].shape == (2, 3, 32, 32)


class Waveform(nn.Module):
    """Takes samples ``[B, T]`` and adds the channel itself."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, 8, 9, stride=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        return self.head(self.filters(x.unsqueeze(1)).mean(-1))


def test_a_waveform_may_come_without_a_channel() -> None:
    ((x,), _), _ = find_example(Waveform(), None, LogitsReader())
    assert tuple(x.shape) == (2, 64)


class Refuses(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not such a one")


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv1d(2, 4, 3),
        nn.Conv2d(3, 4, 3),
        nn.Conv3d(3, 4, 3),
        nn.Embedding(9, 4),
        nn.Linear(7, 4),
        nn.GRU(6, 4),
        nn.BatchNorm1d(7),
        nn.BatchNorm2d(7),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_where_no_guess_runs_the_cause_and_the_remedy_are_named(first: nn.Module) -> None:
    with pytest.raises(SplitError, match=r"ValueError: not such a one.*`example_input=`"):
        find_example(Refuses(first), None, LogitsReader())


class Slow(nn.Module):
    """Each forward takes so many seconds of the clock that is given, and all but the last fail."""

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds.pop(0)
        if self.seconds:
            raise ValueError("not such a one")
        return self.head(self.first(x).mean((2, 3)))


def test_guessing_stops_ten_seconds_after_the_first_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between guesses: the first one may take long, and so may the right one."""
    clock = [0.0]
    monkeypatch.setattr("time.thread_time", lambda: clock[0])
    slow = Slow(clock, [6.0] * 9)
    with pytest.raises(SplitError, match=r"on \[2, 3, 32, 32\] it raised ValueError: not such"):
        find_example(slow, None, LogitsReader())
    assert len(slow.seconds) == 6
    ((x,), _), _ = find_example(Slow(clock, [600.0, 9.0, 600.0]), None, LogitsReader())
    assert tuple(x.shape) == (2, 3, 28, 28)


def test_what_is_not_logits_is_described() -> None:
    with pytest.raises(SplitError, match=r"returned .* where logits \[B, C\] were expected"):
        find_example(nn.Sequential(nn.Linear(7, 4), nn.Flatten(0)), None, LogitsReader())


def test_without_parameters_there_is_nothing_to_guess_from() -> None:
    with pytest.raises(ArgumentError, match="with parameters, but it has none"):
        find_example(nn.Flatten(), None, LogitsReader())


class Crops(nn.Module):
    """Takes a list with a tensor for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, crops: list[Tensor]) -> Tensor:
        return self.net(torch.stack(crops) if isinstance(crops, list) else crops)


class Graphs(Crops):
    """Takes the nodes of all graphs, and whose each node is."""

    def forward(self, nodes: Tensor, owner: Tensor) -> Tensor:  # type: ignore[override]
        sums = torch.zeros(int(owner.max()) + 1, 6).index_add_(0, owner, nodes)
        return self.net(sums)


def test_rows_that_are_no_samples_are_told_from_an_example_that_does_not_run() -> None:
    reader = LogitsReader()
    crops = ([torch.randn(6) for _ in range(5)],)
    with pytest.raises(SplitError, match=r"runs on `example_input` as it is, but not on two rows"):
        find_example(Crops(), crops, reader)
    find_example(Crops(), torch.stack(crops[0]), reader)
    nodes = torch.randn(9, 6), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 4])
    with pytest.raises(SplitError, match=r"shape \[5, 4\] for `example_input`.*has 9 rows.*padded"):
        find_example(Graphs(), nodes, reader)
    with pytest.raises(SplitError, match="does not run on `example_input`"):
        find_example(Crops(), torch.randn(5, 7), reader)


class OneSize(nn.Module):
    """Makes its initial state for a batch size that its constructor was told."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.rnn, self.head = batch_size, nn.GRU(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(1, self.batch_size, 8)
        return self.head(self.rnn(x.transpose(0, 1), start)[1][0])


def test_a_batch_size_that_the_backbone_was_told_is_told_from_rows_that_are_no_samples() -> None:
    with pytest.raises(
        SplitError, match=r"Expected hidden size .*initial state say, from `x\.size"
    ):
        find_example(OneSize(4), torch.randn(4, 3, 6), LogitsReader())
    with pytest.raises(SplitError, match=r"Expected hidden size .*two rows only .*x\.size"):
        RIDEWrapper(OneSize(2), 2, fork_at="rnn", example_input=torch.randn(2, 3, 6))


class TimeFirst(nn.Module):
    """Tokens [T, B], as recurrent layers take them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(9, 8), nn.LSTM(8, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.lstm(self.embed(tokens))[1][0][-1])
        return logits


@pytest.mark.parametrize("shape", [(10, 6), (6, 6), (3, 6), None])
def test_a_batch_along_the_second_dimension_is_named_with_what_to_do(
    shape: tuple[int, int] | None,
) -> None:
    example = None if shape is None else torch.randint(9, shape)
    with pytest.raises(SplitError, match=r"dimension 1 of \[2, .*time first.*transpose inside"):
        RIDEWrapper(TimeFirst(), 2, example_input=example)


class Images(nn.Module):
    """A text with several images, of which the second argument holds all one after the other."""

    def __init__(self, folds: bool = False) -> None:
        super().__init__()
        self.folds = folds
        self.embed, self.encode = nn.Linear(6, 8), nn.Linear(5, 8)
        self.late, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, text: Tensor, images: Tensor) -> Tensor:
        images = images.flatten(0, 1) if self.folds else images
        if len(images) != 2 * len(text):
            raise ValueError(f"{len(text)} texts, {len(images)} images")
        seen = self.encode(images).unflatten(0, (-1, 2)).sum(1)
        return self.fc(self.late(self.embed(text) + seen).relu())


def test_arguments_with_several_entries_for_each_row_are_named() -> None:
    text, images = torch.randn(2, 6), torch.randn(4, 5)
    with pytest.raises(
        SplitError,
        match=r"on two rows.*not on three.*3 texts, 4 images.*`1` of shape \[4, 5\].*\[2, 2, 5\]",
    ):
        RIDEWrapper(Images(), 2, fork_at="late", example_input=(text, images))
    net = Images(folds=True)  # as the message says
    model = RIDEWrapper(net, 2, fork_at="late", example_input=(text, images.unflatten(0, (2, 2))))
    x = torch.randn(5, 6), torch.randn(5, 2, 5)
    serve = RoutingInference(model.eval(), ConfidenceRouter(), threshold=0.5)
    torch.testing.assert_close(serve(*x), serve.dense(*x))


class OneTuple(Crops):
    """Takes tokens and their lengths in one argument, as loaders of texts put them together."""

    def forward(self, batch: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        values, lengths = batch[:2]
        return self.net(values / lengths[:, None])


class OneTupleAndMore(OneTuple):
    """Takes another argument, so that a tuple of two is bound to both."""

    def forward(self, batch: tuple[Tensor, ...], scale: float = 1.0) -> Tensor:  # type: ignore[override]
        assert isinstance(batch, tuple)
        return scale * super().forward(batch)


@pytest.mark.parametrize("backbone", [OneTuple(), OneTupleAndMore()])
@pytest.mark.parametrize("more", [(), (torch.ones(5, 1),)])
def test_a_tuple_that_is_one_argument_is_told_from_several(
    backbone: nn.Module, more: tuple[Tensor, ...]
) -> None:
    batch = (torch.randn(5, 6), torch.ones(5), *more)
    with pytest.raises(SplitError, match=r"(?s)runs on the tuple .*`example_input=\(batch,\)`"):
        find_example(backbone, batch, LogitsReader())
    (args, kwargs), output = find_example(backbone, (batch,), LogitsReader())
    assert (len(args), kwargs) == (1, {})
    assert output.shape == (2, 4)
    with pytest.raises(SplitError, match="does not run on `example_input`"):
        find_example(backbone, (torch.randn(5, 7), torch.ones(5)), LogitsReader())


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.EmbeddingBag(50, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.table(ids).relu())


def test_a_bag_of_embeddings_takes_token_ids() -> None:
    ((ids,), kwargs), output = find_example(Bag().eval(), None, LogitsReader())
    assert (ids.shape, ids.dtype, output.shape) == ((2, 16), torch.int64, (2, 5))
    assert not kwargs
    assert ids.min() >= 0
    assert ids.max() < 50
