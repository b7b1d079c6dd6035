import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

from ride_plugin import ArgumentError, RIDEError
from ride_plugin.longtail import LongTailedSubset, long_tailed_counts, long_tailed_indices
from tests.reference import DATA

LABELS = torch.arange(120) % 4  # 30 images a class


def test_counts_of_cifar_100_lt_are_the_fields() -> None:
    counts = long_tailed_counts(100, 500, 100)
    assert counts[:5] == [500, 477, 455, 434, 415]
    assert (counts[-1], sum(counts)) == (5, 10847)
    assert [sum(long_tailed_counts(10, 5000, rho)) for rho in (10, 50, 100)] == [
        20431,
        13996,
        12406,
    ]


@pytest.mark.reference
def test_counts_equal_those_of_the_real_data_set() -> None:
    with np.load(DATA / "cifar100_lt.npz") as arrays:
        there = np.bincount(arrays["train_labels"]).tolist()
    assert long_tailed_counts(100, 500, 100) == there


def test_step_profile_halves_the_classes() -> None:
    assert long_tailed_counts(5, 50, 10, "step") == [50, 50, 5, 5, 5]


def test_factor_one_keeps_everything() -> None:
    assert long_tailed_counts(3, 8, 1) == [8, 8, 8]
    assert long_tailed_indices(LABELS, 1).tolist() == list(range(120))


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_indices_hold_the_counts_without_repetition(profile) -> None:
    indices = long_tailed_indices(LABELS, 10, profile=profile)
    assert LABELS[indices].bincount().tolist() == long_tailed_counts(4, 30, 10, profile)
    assert len(set(indices.tolist())) == len(indices)


def test_the_seed_or_generator_chooses_the_images() -> None:
    def draw(**how):
        return long_tailed_indices(LABELS, 10, **how).tolist()

    assert draw(seed=1) == draw(seed=1) == draw(generator=torch.Generator().manual_seed(1))
    assert draw(seed=1) != draw(seed=2)


def test_every_image_of_a_class_is_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(120)
    for _ in range(600):
        kept[long_tailed_indices(LABELS, 10, generator=generator)] += 1
    for c, count in enumerate(long_tailed_counts(4, 30, 10)):
        share = count / 30
        deviation = (600 * share * (1 - share)) ** 0.5
        assert ((kept[c == LABELS] - 600 * share).abs() <= 5 * deviation).all()


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    long_tailed_indices(LABELS, 10)
    assert torch.equal(before, torch.get_rng_state())


class Labelled(torch.utils.data.Dataset):
    def __init__(self, **labels) -> None:
        self.__dict__.update(labels)

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    "dataset",
    [
        Labelled(targets=LABELS.tolist()),
        Labelled(labels=LABELS.numpy()),
        TensorDataset(torch.arange(120), LABELS),
    ],
    ids=["targets", "labels", "tensors"],
)
def test_subset_finds_the_labels_and_describes_itself(dataset) -> None:
    data = LongTailedSubset(dataset, 10)
    assert data.class_counts == [30, 13, 6, 3]
    assert data.labels.bincount().tolist() == data.class_counts
    assert len(data) == 52
    images = [x[0] if isinstance(x, tuple) else x for x in (data[i] for i in range(52))]
    assert LABELS[torch.tensor(images)].tolist() == data.labels.tolist()


class Shown(Labelled):
    """Gives out each sample's label as well."""

    def __getitem__(self, index: int):
        label = self.targets[index]
        return index, self.target_transform(label) if hasattr(self, "target_transform") else label


class Turned(Subset):
    """A part with transforms of its own, as split training sets have them."""

    def __init__(self, dataset: Dataset, indices: range) -> None:
        super().__init__(dataset, indices)
        self.target_transform = lambda label: 3 - label

    def __getitem__(self, index: int):
        image, label = super().__getitem__(index)
        return image, self.target_transform(int(label))

    def __getitems__(self, indices: list[int]):
        return [self[index] for index in indices]


UNLABELLED = torch.cat([LABELS[:60], torch.full((60,), -1)])


@pytest.mark.parametrize(
    "dataset",
    [
        Subset(Shown(targets=LABELS.tolist()), range(10, 110)),
        Subset(TensorDataset(torch.arange(120), LABELS), np.arange(119, 10, -1)),
        Subset(Subset(Shown(targets=LABELS), list(range(119))), torch.arange(5, 100)),
        random_split(Shown(targets=LABELS.numpy()), [100, 20])[0],
        Subset(Shown(targets=LABELS, target_transform=lambda label: 3 - label), range(100)),
        Turned(Shown(targets=LABELS.tolist()), range(10, 110)),
        Turned(TensorDataset(torch.arange(120), LABELS), range(120)),
        Subset(Shown(targets=UNLABELLED), range(60)),
        Subset(LongTailedSubset(Shown(targets=LABELS), 2), range(1, 70)),
        ConcatDataset([Shown(targets=LABELS.tolist()), Subset(Shown(targets=LABELS), [3, 4, 9])]),
    ],
    ids=[
        *("range", "tensors", "nested", "split", "transform", "turned", "turned tensors"),
        *("unlabelled", "long-tailed", "concat"),
    ],
)
def test_labels_are_those_of_the_sets_behind_a_part_or_a_union(dataset) -> None:
    data = LongTailedSubset(dataset, 3)
    assert data.labels.tolist() == [int(label) for _, label in data]
    assert data.labels.bincount().tolist() == data.class_counts


class Merged(Subset):
    """A part whose own code merges classes; tests say in what form the label comes."""

    def __init__(self, dataset: Dataset, form=lambda x, y, index: (x, y)) -> None:
        super().__init__(dataset, range(120))
        self.form = form

    def __getitem__(self, index: int):
        x, y = super().__getitem__(index)
        return self.form(x, y // 2, index)

    def __getitems__(self, indices: list[int]):
        return [self[index] for index in indices]


class Mistaken(Shown):
    """Draws some labels anew, and its images at random."""

    def __getitem__(self, index: int):
        label = self.targets[index]
        return torch.randn(2), 0 if label == 3 else label


WHOLE = TensorDataset(torch.randn(120, 2), LABELS)


@pytest.mark.parametrize(
    "dataset",
    [
        Merged(WHOLE),
        Subset(Merged(WHOLE), range(1, 119)),
        ConcatDataset([Merged(WHOLE), WHOLE]),
        Mistaken(targets=LABELS.tolist()),
        Merged(WHOLE, lambda x, y, index: {"image": x, "label": np.int64(y)}),
        Merged(WHOLE, lambda x, y, index: (x, y.view(1), index)),
        Merged(WHOLE, lambda x, y, index: (x, torch.eye(4)[y])),
        Merged(WHOLE, lambda x, y, index: (x, np.eye(4, dtype=np.int64)[y])),
    ],
    ids=["part", "part of it", "union", "some", "dict", "with index", "one-hot", "one-hot array"],
)
def test_labels_that_samples_do_not_come_with_are_refused(dataset) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ArgumentError, match=r"sample \d+ comes with \d, and \d was read"):
        LongTailedSubset(dataset, 3)
    assert torch.equal(torch.get_rng_state(), state)
    labels = torch.arange(len(dataset)) % 2
    assert LongTailedSubset(dataset, 3, labels=labels).class_counts[0] == len(dataset) // 2


class Unread(Labelled):
    def __getitem__(self, index: int):
        raise OSError("no such file")


@pytest.mark.parametrize(
    "dataset",
    [
        Merged(WHOLE, lambda x, y, index: (x, index)),
        Merged(WHOLE, lambda x, y, index: (x, y, int(LABELS[index]))),
        Merged(WHOLE, lambda x, y, index: (x, torch.rand(4))),
        Merged(WHOLE, lambda x, y, index: (x, torch.eye(4)[LABELS[index]])),
        Merged(WHOLE, lambda x, y, index: x),
        Unread(targets=LABELS.tolist()),
    ],
    ids=["index", "both labels", "shares", "one-hot", "image alone", "no file"],
)
def test_samples_without_a_label_or_with_the_right_one_say_nothing(dataset) -> None:
    assert LongTailedSubset(dataset, 3).class_counts == [30, 20, 14, 10]


def test_a_part_of_a_set_without_labels_is_refused() -> None:
    for dataset in (Subset(Labelled(), range(9)), ConcatDataset([Labelled()])):
        with pytest.raises(ArgumentError, match=r"`dataset`.*Labelled.*labels="):
            LongTailedSubset(dataset)


def test_labels_may_be_handed_in() -> None:
    assert LongTailedSubset(Labelled(), 10, labels=LABELS).class_counts == [30, 13, 6, 3]


def test_the_rarest_class_has_the_size_that_is_asked_for_and_no_less() -> None:
    for profile in ("exp", "step"):
        assert long_tailed_counts(2, 98, 49, profile) == [98, 2]
        for max_count in range(1, 400):
            assert long_tailed_counts(3, max_count, max_count, profile)[-1] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: long_tailed_counts(10, 500, 0.01), "`imbalance_factor`.*100 where.*0.01"),
        (lambda: long_tailed_counts(10, 50, 100), "`imbalance_factor`.*rarest.*at most 50"),
        (lambda: long_tailed_counts(10, 50, 10, "linear"), "`profile`.*'exp', 'step'.*linear"),
        (lambda: long_tailed_counts(0, 50, 10), "`num_classes`"),
        (lambda: long_tailed_indices(LABELS, 10, max_count=31), "31 images of class 0, but got 30"),
        (lambda: long_tailed_indices([0, 0, 2, 2], 1), "`labels`.*none of class 1"),
        (lambda: LongTailedSubset(Labelled()), "`dataset`.*Labelled.*labels="),
        (lambda: LongTailedSubset(Labelled(), labels=[0, 1]), "120 samples, but got 2"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        call()


def test_a_stream_of_unknown_length_is_refused() -> None:
    class Stream(Dataset):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(ArgumentError, match="map-style data set"):
        LongTailedSubset(Stream(), 2, labels=[0, 1, 1, 0])


def test_a_single_class_has_all_its_images() -> None:
    assert long_tailed_counts(1, 50, 10) == [50]


@pytest.mark.parametrize("targets", [torch.arange(400) % 4, [k % 4 for k in range(400)]])
def test_a_target_transform_is_applied_to_the_labels_too(targets) -> None:
    class Turned(torch.utils.data.Dataset):  # as torchvision's, whose targets are as in the file
        def __init__(self) -> None:
            self.targets, self.target_transform = targets, lambda label: 3 - label

        def __len__(self) -> int:
            return 400

        def __getitem__(self, index: int):
            return torch.zeros(1), self.target_transform(int(self.targets[index]))

    data = LongTailedSubset(Turned(), 10)
    given = torch.tensor([label for _, label in data])
    assert torch.equal(given, data.labels)
    assert given.bincount().tolist() == data.class_counts == [100, 46, 21, 10]


NAMES = ["cat", "dog", "eel", "fox"]


class Named(Labelled):
    """Stores names; the number of each comes with the sample."""

    def __getitem__(self, index: int):
        return torch.zeros(1), self.target_transform(self.targets[index])


@pytest.mark.parametrize(
    "targets",
    [
        [NAMES[k] for k in LABELS.tolist()],
        tuple(NAMES[k] for k in LABELS.tolist()),
        np.array(NAMES)[LABELS.numpy()],
        np.array(NAMES, dtype=object)[LABELS.numpy()],
        [(NAMES[k], k) for k in LABELS.tolist()],
    ],
    ids=["list", "tuple", "array", "objects", "pairs"],
)
def test_names_that_a_target_transform_maps_to_numbers_are_labels(targets) -> None:
    def number(label):
        return torch.tensor(NAMES.index(label[0] if isinstance(label, tuple) else label))

    data = LongTailedSubset(Named(targets=targets, target_transform=number), 10)
    assert torch.equal(torch.stack([label for _, label in data]), data.labels)
    assert data.labels.bincount().tolist() == data.class_counts == [30, 13, 6, 3]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"targets": ["cat"] * 120}, r"`labels` to be a tensor.*got \['cat', 'cat'"),
        ({"targets": np.array(["cat"] * 120)}, "`labels` to be a tensor.*got an array of shape"),
        (
            {"targets": ["cat"] * 120, "target_transform": {"dog": 0}.__getitem__},
            r"`target_transform` maps.*failed with KeyError: 'cat'. Pass labels=\[the class",
        ),
        ({"targets": ["cat"] * 120, "target_transform": str.upper}, r"`labels`.*\['CAT', 'CAT'"),
        ({"targets": 7, "target_transform": int}, "`target_transform`.*failed with TypeError"),
    ],
)
def test_names_without_numbers_are_refused(labels, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LongTailedSubset(Labelled(**labels), 10)
