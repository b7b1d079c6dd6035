from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ride_plugin import RIDEError
from ride_plugin.longtail import ClassBalancedSampler
from ride_plugin.longtail._sampler import balanced_draw

LABELS = torch.tensor([0, 1, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0, 0] * 5)  # 45, 15 and 5 images


def test_classes_come_up_equally_often() -> None:
    counts = Counter(LABELS[list(ClassBalancedSampler(LABELS))].tolist())
    assert sum(counts.values()) == 65
    assert max(counts.values()) - min(counts.values()) <= 1


def test_images_of_a_class_come_up_equally_often() -> None:
    drawn = Counter(ClassBalancedSampler(LABELS))
    for c in range(3):
        times = [drawn[i] for i in (c == LABELS).nonzero().flatten().tolist()]
        assert max(times) - min(times) <= 1


def test_every_image_has_the_probability_of_the_equation() -> None:
    sampler = ClassBalancedSampler(LABELS, num_samples=10)
    drawn: Counter[int] = Counter()
    for epoch in range(3000):
        sampler.set_epoch(epoch)
        drawn.update(sampler)
    for i, label in enumerate(LABELS.tolist()):
        expected = 30000 / 3 / int((label == LABELS).sum())
        assert drawn[i] == pytest.approx(expected, abs=5 * expected**0.5)


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_ranks_split_one_common_draw_evenly(num_replicas: int) -> None:
    ranks = [
        ClassBalancedSampler(LABELS, num_replicas=num_replicas, rank=r, seed=3)
        for r in range(num_replicas)
    ]
    parts = [list(r) for r in ranks]
    length = -(-65 // num_replicas)
    assert {len(p) for p in parts} == {length} == {len(r) for r in ranks}
    whole = list(ClassBalancedSampler(LABELS, num_samples=length * num_replicas, seed=3))
    assert [parts[i % num_replicas][i // num_replicas] for i in range(len(whole))] == whole


def test_the_epoch_is_the_whole_state() -> None:
    sampler = ClassBalancedSampler(LABELS, seed=5)
    first = list(sampler)
    sampler.set_epoch(4)
    fifth = list(sampler)
    resumed = ClassBalancedSampler(LABELS, seed=5)
    resumed.set_epoch(4)
    assert list(resumed) == fifth != first


def test_each_pass_draws_anew_until_an_epoch_is_set() -> None:
    ranks = [ClassBalancedSampler(LABELS, num_replicas=2, rank=rank) for rank in range(2)]
    loaders = [torch.utils.data.DataLoader(range(len(LABELS)), 11, sampler=s) for s in ranks]
    next(iter(loaders[0]))  # broken off, on each rank
    next(iter(loaders[1]))
    for epoch in range(1, 4):
        for loader, rank in zip(loaders, range(2), strict=True):
            told = ClassBalancedSampler(LABELS, num_replicas=2, rank=rank)
            told.set_epoch(epoch)
            drawn = list(told)
            assert torch.cat(list(loader)).tolist() == drawn == list(told)
    ranks[0].set_epoch(0)
    assert list(ranks[0]) == list(ranks[0])


def test_seed_and_epoch_do_not_collide() -> None:
    a, b = ClassBalancedSampler(LABELS, seed=0), ClassBalancedSampler(LABELS, seed=1)
    a.set_epoch(1)
    assert list(a) != list(b)


def test_fewer_samples_than_classes_are_distinct_classes() -> None:
    drawn = list(ClassBalancedSampler(LABELS, num_samples=2))
    assert len(set(LABELS[drawn].tolist())) == 2


class CountedCalls:
    """A generator of random numbers that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.generator = np.random.default_rng(0)

    def __getattr__(self, name: str) -> object:
        self.calls += 1
        return getattr(self.generator, name)


@pytest.mark.parametrize("num_samples", [1, 7, 50_000])
def test_a_long_epoch_asks_for_random_numbers_as_often_as_a_short_one(num_samples: int) -> None:
    counted = CountedCalls()
    by_class = [np.arange(90), np.arange(90, 100), np.array([100])]
    draw = balanced_draw(by_class, num_samples, counted)  # type: ignore[arg-type]
    assert len(draw) == num_samples
    assert counted.calls <= len(by_class) + 1


@pytest.mark.parametrize(
    "labels", [[70_000, 3, 70_000, 300], [7, 7], [0, 255, 0, 65_535], [0, 256, 256, 1]]
)
def test_classes_need_not_follow_one_another(labels: list[int]) -> None:
    sampler = ClassBalancedSampler(labels, num_samples=20 * len(set(labels)))
    assert Counter(labels[i] for i in sampler) == dict.fromkeys(labels, 20)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(ClassBalancedSampler(LABELS))
    assert torch.equal(before, torch.get_rng_state())


def test_feeds_a_data_loader() -> None:
    data = torch.utils.data.TensorDataset(LABELS)
    loader = torch.utils.data.DataLoader(
        data, batch_size=15, sampler=ClassBalancedSampler(LABELS, num_samples=30)
    )
    assert [Counter(y.tolist()) for (y,) in loader] == [Counter({0: 5, 1: 5, 2: 5})] * 2


def _group_of_three(monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)


def test_a_sampler_made_before_the_process_group_takes_its_part_of_the_draw(monkeypatch) -> None:
    sampler = ClassBalancedSampler(LABELS)
    assert (sampler.num_replicas, len(sampler)) == (1, 65)
    _group_of_three(monkeypatch)
    assert len(sampler) == 22
    assert list(sampler) == list(ClassBalancedSampler(LABELS, num_replicas=3, rank=2))
    assert (sampler.num_replicas, sampler.rank) == (3, 2)


class Wrapper(torch.utils.data.DistributedSampler):
    """What libraries wrap around a sampler that they take for one of a single process."""

    def __init__(self, sampler, num_replicas: int, rank: int) -> None:
        self.sampler = sampler
        super().__init__(sampler, num_replicas, rank, shuffle=False)

    def __iter__(self):
        drawn = list(self.sampler)
        return (drawn[i] for i in super().__iter__())


def test_indices_that_are_shared_twice_are_warned_of(monkeypatch) -> None:
    _group_of_three(monkeypatch)
    wrapped = Wrapper(ClassBalancedSampler(LABELS), 3, 2)
    loader = torch.utils.data.DataLoader(LABELS, batch_size=4, sampler=wrapped)
    with pytest.warns(UserWarning, match=r"Wrapper shares .* 3 ranks.* 1/3 .*num_replicas=1, rank"):
        list(loader)


def test_a_whole_draw_may_be_shared_by_the_caller(monkeypatch) -> None:
    _group_of_three(monkeypatch)
    whole = ClassBalancedSampler(LABELS, num_samples=66, num_replicas=1, rank=0)
    whole.set_epoch(0)  # as each rank does with a sampler of its own
    drawn = [i for rank in range(3) for i in Wrapper(whole, 3, rank)]
    counts = Counter(LABELS[drawn].tolist())
    assert counts == Counter({0: 22, 1: 22, 2: 22})


def test_a_loader_or_sampler_of_one_process_is_not_warned_of(monkeypatch) -> None:
    _group_of_three(monkeypatch)
    sampler = ClassBalancedSampler(LABELS)
    assert len(list(Wrapper(sampler, 1, 0))) == 22
    assert len(list(torch.utils.data.DataLoader(LABELS, batch_size=11, sampler=sampler))) == 2


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([], {}, r"`labels`.*at least one.*\[0\]"),
        ([0.5, 1.0], {}, "`labels`.*integer"),
        ([0, -1], {}, "`labels`.*from -1"),
        ([500, 120, 30, 7], {}, "`labels`.*4 numbers that fall from 500 to 7, like `class_counts`"),
        (torch.tensor([9, 9, 4]), {}, "`labels`.*like `class_counts`"),
        ([0, 1], {"num_samples": 0}, "`num_samples`.*got 0"),
        ([0, 1], {"num_samples": 2.5}, "`num_samples`.*an integer.*2.5"),
        ([0, 1], {"num_replicas": 2, "rank": 2}, "`rank`.*from 0 to 1, but got 2"),
        ([0, 1], {"seed": -1}, "`seed`.*-1"),
    ],
)
def test_bad_arguments_are_named(labels, arguments, message: str) -> None:
    with pytest.raises(RIDEError, match=message):
        ClassBalancedSampler(labels, **arguments)


def test_one_sample_is_enough() -> None:
    assert len(list(ClassBalancedSampler([0, 1, 1], num_samples=1))) == 1


class Shuffled(torch.utils.data.Sampler):
    """A sampler of samplers, which could share among ranks and does not."""

    num_replicas = None

    def __init__(self, inner: ClassBalancedSampler) -> None:
        self.inner = inner

    def __iter__(self):
        yield from reversed(list(self.inner))


def test_a_caller_that_does_not_share_is_not_warned_of() -> None:
    sampler = ClassBalancedSampler(LABELS, num_replicas=2, rank=0)
    sampler.set_epoch(0)
    shuffled = Shuffled(sampler)
    assert sorted(shuffled) == sorted(sampler)  # warnings are errors here
    shuffled.num_replicas = 2
    with pytest.warns(UserWarning, match="shares the indices .* among 2 ranks"):
        list(shuffled)


@pytest.mark.parametrize(
    "labels",
    [
        [3, 2, 1, 1, 1],  # as many entries as classes
        [500, 120, 7, 0],  # a class without samples is no count
        [900, 120, 7, 30],  # a few samples of many classes
        [999, 998, 997, 997],  # the last classes only
        [9, 2],
    ],
)
def test_labels_that_look_a_little_like_counts_are_taken(labels: list[int]) -> None:
    assert set(ClassBalancedSampler(labels, num_samples=50)) == set(range(len(labels)))


class Images(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("length", [64, 66])
def test_labels_of_other_data_are_told_once(length: int, workers: int) -> None:
    sampler = ClassBalancedSampler(LABELS)
    loader = DataLoader(Images(length), batch_size=1, sampler=sampler, num_workers=workers)
    with pytest.warns(UserWarning, match=f"65 entries.*has {length} samples.*`class_counts`"):
        next(iter(loader))
    next(iter(loader))


def test_labels_of_the_data_are_silent_however_they_are_loaded() -> None:
    sampler = ClassBalancedSampler(LABELS)
    batches = BatchSampler(sampler, 5, drop_last=False)
    for arguments in ({"sampler": sampler}, {"batch_sampler": batches}):
        assert len(list(DataLoader(Images(65), **arguments))) > 0
    assert len(list(DataLoader(Images(65), sampler=sampler, batch_size=None))) == 65
    outer = DataLoader([ClassBalancedSampler(LABELS)], collate_fn=lambda samplers: samplers[0])
    assert len(list(next(iter(outer)))) == 65  # a loader of others, of another length


@pytest.mark.parametrize(("name", "value"), [("num_samples", 5), ("num_replicas", 2), ("rank", 1)])
def test_what_would_change_nothing_when_it_is_set_later_is_refused(name: str, value: int) -> None:
    sampler = ClassBalancedSampler(LABELS)
    list(sampler)
    setattr(sampler, name, value)
    with pytest.raises(RIDEError, match=r"to stay \(1, 0, .*\), but got .* changes nothing"):
        list(sampler)
    with pytest.raises(AttributeError, match="labels"):
        sampler.labels = LABELS.numpy()
