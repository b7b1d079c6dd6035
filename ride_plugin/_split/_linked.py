"""A module whose parts read tensors of each other: keeps them together when tensors move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from ride_plugin._split._probe import detached_activations
from ride_plugin._split._views import Link


class LinkedModule(nn.Module):
    """Refreshes its links after ``.to()`` and after loading, also with ``assign=True``."""

    def __init__(self) -> None:
        super().__init__()
        self._links: list[Link] = []
        self.register_load_state_dict_post_hook(_relink)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Activations that a backbone keeps (`self.feat = out`) would make deepcopy fail.
        memo.update(detached_activations(self))
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _relink(self)
        return self


def _relink(module: LinkedModule, *_: Any) -> None:
    for link in module._links:
        link.refresh()
