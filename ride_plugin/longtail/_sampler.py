"""Class-balanced sampling that is right under distributed training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import FrameType

import numpy as np
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from ride_plugin._checks import Numbers, as_labels, check_integer
from ride_plugin._distributed import running
from ride_plugin._errors import ArgumentError, warn_caller

_AT_ONCE = 65536


def balanced_draw(
    by_class: list[NDArray[np.int64]], num_samples: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw ``num_samples`` of the indices in ``by_class`` so that all classes come equally often.

    Classes come in rounds, each a fresh permutation of all of them; within a class, images come in
    passes, each a fresh permutation too. So counts of classes, and of images within a class,
    differ by one at most, while each image keeps the probability ``1 / (C n_c)`` of a free draw.

    Example:
        >>> draw = balanced_draw([np.array([0, 1, 2]), np.array([3])], 4, np.random.default_rng(0))
        >>> sorted(np.array([0, 0, 0, 1])[draw].tolist())
        [0, 0, 1, 1]
    """
    rounds = -(-num_samples // len(by_class))
    images = np.empty((len(by_class), rounds), dtype=np.int64)
    for row, members in zip(images, by_class, strict=True):
        row[:] = _in_passes(members, rounds, generator)
    # A round takes the next image of every class; all rounds are permuted in one call.
    draw = np.ascontiguousarray(images.T)
    generator.permuted(draw, axis=1, out=draw)
    return draw.reshape(-1)[:num_samples]


def _in_passes(
    members: NDArray[np.int64], length: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    if len(members) >= length:
        return generator.choice(members, length, replace=False)
    passes = np.tile(members, (-(-length // len(members)), 1))
    return generator.permuted(passes, axis=1).reshape(-1)[:length]


def _callers() -> Iterator[object]:
    """The objects whose methods are running, from the one that asks outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def _refuse_counts(labels: NDArray[np.int64]) -> None:
    """Refuse numbers of samples, from the most frequent class to the rarest one.

    Labels may skip classes, and those of a few samples do, so no one sign is enough: there are more
    classes than entries, none is class 0, and the entries fall, to half of the first or less.
    """
    most, least = int(labels.max()), int(labels.min())
    falls = len(labels) > 2 and bool((labels[1:] <= labels[:-1]).all())
    if falls and len(labels) <= most and 1 <= least <= most / 2:
        raise ArgumentError(
            f"Expected argument `labels` to hold the class of every image, but got {len(labels)} "
            f"numbers that fall from {most} to {least}, like `class_counts`. Pass the labels of "
            "the data set, `dataset.targets` for example; they are counted here."
        )


def _indices_by_class(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of the images of each class that occurs, classes ascending."""
    narrow = labels.astype(np.min_scalar_type(labels.max()))  # numpy sorts 16 bits by radix
    counts = np.bincount(labels)
    return np.split(np.argsort(narrow, kind="stable"), np.cumsum(counts[counts > 0])[:-1])


class ClassBalancedSampler(DistributedSampler[int]):
    r"""Sampler that shows every class equally often, alone or under distributed training.

    $$p_i = \frac{1}{C \, n_{y_i}}$$

    first a class uniformly, then an image of it. Source: Kang et al., "Decoupling Representation
    and Classifier for Long-Tailed Recognition", ICLR 2020, section 3 (class-balanced sampling).
    Differs from independent draws by drawing in rounds (:func:`balanced_draw`): same
    probabilities, less variance.

    Every rank computes the same draw from ``(seed, epoch)`` and takes its own part of it, so the
    ranks' parts are disjoint and of equal length. Being a DistributedSampler, it is left as it is
    by libraries that put one in place of other samplers (Lightning, Ignite). Libraries that share
    every loader's batches among the ranks (accelerate, and Hugging Face's Trainer with it) need
    the whole draw: ``num_replicas=1, rank=0``. Indices that are shared twice are warned of.

    Differs from DistributedSampler where ``set_epoch`` is never called: each pass, also one that
    is broken off, then takes the epoch after that of the pass before, from 0. Ranks agree on the
    draw as long as all of them begin equally many passes, and a run that is resumed begins with
    the first draw again. With ``set_epoch`` before each epoch neither matters: the epoch is the
    whole state.

    Example:
        >>> labels = [0] * 90 + [1] * 10
        >>> sampler = ClassBalancedSampler(labels)
        >>> sum(labels[i] for i in sampler), len(sampler)
        (50, 100)
    """

    _placed: tuple[int, int, int] | None = None  # what `_place` has found last

    def __init__(
        self,
        labels: Numbers,
        *,
        num_samples: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        """Sort the images by class.

        Args:
            labels: class of every image of the data set, ``[N]``.
            num_samples: length of an epoch over all ranks; N if None. It is rounded up to a
                multiple of ``num_replicas``.
            num_replicas: number of ranks. None asks torch.distributed at each use, so that the
                sampler may be made before the process group; 1 where there is none.
            rank: this process's rank; None asks torch.distributed, and is 0 where there is none.
            seed: the same on every rank.

        Raises:
            ArgumentError: labels are not integers ``[N]`` or can only be class counts, or a number
                is out of range.
        """
        self._labels = as_labels(labels).numpy()
        _refuse_counts(self.labels)
        self._by_class = _indices_by_class(self.labels)
        if num_samples is None:
            num_samples = len(self.labels)
        self._asked = check_integer(num_samples, "num_samples", 1), num_replicas, rank
        seed = check_integer(seed, "seed")
        replicas, rank = self._place()
        self._epoch_is_set = False
        self._compared = False
        super().__init__(self.labels, replicas, rank, seed=seed)  # type: ignore[arg-type]
        self._placed = None  # DistributedSampler has counted one index for each image
        self._place()

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of every image, which was sorted by class when the sampler was made."""
        return self._labels

    def _place(self) -> tuple[int, int]:
        """Number of ranks, this rank, and with them the length of an epoch, as of now."""
        if self._placed is not None:
            found = self.num_replicas, self.rank, self.num_samples
            if found != self._placed:
                raise ArgumentError(
                    "Expected `num_replicas`, `rank` and `num_samples` of a ClassBalancedSampler "
                    f"to stay {self._placed}, but got {found}: setting them later changes nothing, "
                    "since they are computed anew at each use. Make another sampler with these "
                    "arguments."
                )
        self._placed = None
        num_samples, num_replicas, rank = self._asked
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if running() else 1
        if rank is None:
            rank = distributed.get_rank() if running() else 0
        self.num_replicas = check_integer(num_replicas, "num_replicas", 1)
        self.rank = check_integer(rank, "rank", 0, self.num_replicas - 1)
        self.num_samples = -(-num_samples // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas
        self._placed = self.num_replicas, self.rank, self.num_samples
        return self.num_replicas, self.rank

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of all passes until the next call, which is made before each epoch.

        Raises:
            ArgumentError: ``epoch`` is not an integer >= 0.
        """
        self.epoch = check_integer(epoch, "epoch")
        self._epoch_is_set = True

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices of the epoch that was set, or else of the next one.

        Warns:
            UserWarning: what asks for them shares them among the ranks once more, or loads a data
                set of another length than ``labels`` have.
        """
        self._place()
        if not self._compared:
            self._compared = True
            self._compare_with_the_data()
        if self.num_replicas > 1:
            self._warn_if_shared_again()
        # A sequence as seed keeps (seed, epoch) pairs apart, where seed + epoch would collide.
        generator = np.random.default_rng([self.seed, self.epoch])
        if not self._epoch_is_set:
            self.epoch += 1
        draw = balanced_draw(self._by_class, self.total_size, generator)
        own = draw[self.rank :: self.num_replicas]
        for start in range(0, len(own), _AT_ONCE):  # Python's integers need four times the memory
            yield from own[start : start + _AT_ONCE].tolist()

    def __len__(self) -> int:
        """Return the number of indices that each rank gets per epoch."""
        self._place()
        return self.num_samples

    def _compare_with_the_data(self) -> None:
        """Look for the loader that asks: where there are fewer labels, some samples never come."""
        for caller in _callers():
            source = getattr(caller, "_index_sampler", None)  # of a loader's iterator
            if self is not source and self is not getattr(source, "sampler", None):
                continue
            try:
                length = len(getattr(caller, "_dataset", None))  # type: ignore[arg-type]
            except TypeError:  # it has none, or one without a length
                return
            if length != len(self.labels):
                warn_caller(
                    f"Argument `labels` of ClassBalancedSampler has {len(self.labels)} entries, "
                    f"but the data set that is loaded has {length} samples, so indices end at "
                    f"{len(self.labels) - 1}. Pass the class of every sample of this data set, in "
                    "its order, and no `class_counts`."
                )
            return

    def _warn_if_shared_again(self) -> None:
        """Look among the callers for a sampler or loader that shares among ranks, too."""
        for caller in _callers():
            if caller is self or not isinstance(caller, (Sampler, DataLoader)):
                continue
            places = (caller, getattr(caller, "state", None))  # accelerate's dispatcher: the latter
            names = ("num_replicas", "num_processes")
            ranks = max(getattr(place, name, 1) or 1 for place in places for name in names)
            if ranks > 1:
                warnings.warn(
                    f"{type(caller).__name__} shares the indices of ClassBalancedSampler among "
                    f"{ranks} ranks, but they are one rank's share already, so an epoch shows only "
                    f"1/{ranks} of the samples asked for. Make the sampler with `num_replicas=1, "
                    "rank=0`, which leaves the sharing to the caller.",
                    stacklevel=2,
                )
                return
