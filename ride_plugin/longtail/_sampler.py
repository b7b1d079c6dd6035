"""Class-balanced sampling that is right under distributed training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import Sampler

from ride_plugin._checks import Numbers, as_labels, check_integer

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


def _indices_by_class(labels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of the images of each class that occurs, classes ascending."""
    narrow = labels.astype(np.min_scalar_type(labels.max()))  # numpy sorts 16 bits by radix
    counts = np.bincount(labels)
    return np.split(np.argsort(narrow, kind="stable"), np.cumsum(counts[counts > 0])[:-1])


class ClassBalancedSampler(Sampler[int]):
    r"""Sampler that shows every class equally often, alone or under distributed training.

    $$p_i = \frac{1}{C \, n_{y_i}}$$

    first a class uniformly, then an image of it. Source: Kang et al., "Decoupling Representation
    and Classifier for Long-Tailed Recognition", ICLR 2020, section 3 (class-balanced sampling).
    Differs from independent draws by drawing in rounds (:func:`balanced_draw`): same
    probabilities, less variance.

    Every rank computes the same draw from ``(seed, epoch)`` and takes its own part of it, so the
    ranks' parts are disjoint and of equal length. The epoch is the whole state: after a restart,
    ``set_epoch`` alone continues the run.

    Example:
        >>> labels = [0] * 90 + [1] * 10
        >>> sampler = ClassBalancedSampler(labels)
        >>> sum(labels[i] for i in sampler), len(sampler)
        (50, 100)
    """

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
            num_replicas: number of ranks; that of torch.distributed if None, or 1.
            rank: this process's rank; that of torch.distributed if None, or 0.
            seed: the same on every rank.

        Raises:
            ArgumentError: labels are not integers ``[N]``, or a number is out of range.
        """
        self.labels = as_labels(labels).numpy()
        self._by_class = _indices_by_class(self.labels)
        running = distributed.is_available() and distributed.is_initialized()
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if running else 1
        if rank is None:
            rank = distributed.get_rank() if running else 0
        self.num_replicas = check_integer(num_replicas, "num_replicas", 1)
        self.rank = check_integer(rank, "rank", 0, self.num_replicas - 1)
        if num_samples is None:
            num_samples = len(self.labels)
        self.num_samples = -(-check_integer(num_samples, "num_samples", 1) // self.num_replicas)
        self.seed = check_integer(seed, "seed")
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's draw; call it before each epoch, else every epoch repeats the first.

        Raises:
            ArgumentError: ``epoch`` is not an integer >= 0.
        """
        self.epoch = check_integer(epoch, "epoch")

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices of the current epoch."""
        # A sequence as seed keeps (seed, epoch) pairs apart, where seed + epoch would collide.
        generator = np.random.default_rng([self.seed, self.epoch])
        draw = balanced_draw(self._by_class, self.num_samples * self.num_replicas, generator)
        own = draw[self.rank :: self.num_replicas]
        for start in range(0, len(own), _AT_ONCE):  # Python's integers need four times the memory
            yield from own[start : start + _AT_ONCE].tolist()

    def __len__(self) -> int:
        """Return the number of indices that each rank gets per epoch."""
        return self.num_samples
