"""Values of the trunk that no expert reads: they take no memory, and whoever reads one is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from ride_plugin._errors import ReplayError
from ride_plugin._tree import holds_tensors, map_tensors, tensors_in

# Operations that look at a tensor's values, although they return no tensor.
_READS = frozenset(
    {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__array__", "__contains__"}
    | {"__bool__", "__int__", "__float__", "__complex__", "__index__"}
)

# What returns the same values as another tensor: hooks do so before they ask for its shape.
_SAME = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


def reads(func: Callable[..., Any], result: Any) -> bool:
    """Whether an operation that returned ``result`` has read values, not a shape alone."""
    return getattr(func, "__name__", "") in _READS or holds_tensors(result)


def hollow(value: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory, and NaN, should anybody read it."""
    if value.layout is not torch.strided:
        return torch.full((), float("nan"), dtype=value.dtype, device=value.device).expand(
            value.shape
        )
    return value.new_full((), float("nan")).expand(value.shape)


def is_hollow(value: Tensor) -> bool:
    """Whether a value takes no memory, as one that nobody reads.

    Not so one without elements, of which none can be taken to stand for all.
    """
    if value.dim() < 2 or value.layout is not torch.strided:
        return False
    return not any(value.stride()) and value.numel() > 0


class Unread(Tensor):
    """A hollow value as an expert gets it: it may be handed on and asked for its shape.

    What the build takes for reading is refused here, so nothing that it saw can fail. Before the
    fork (a hook of the expert may change its arguments) what is computed with it is unread as well.
    """

    key: str
    forked: Callable[[], bool]

    @staticmethod
    def of(value: Tensor, key: str, forked: Callable[[], bool]) -> Tensor:
        """What step ``key`` of the trunk returned, or an argument of the forward.

        ``forked`` tells whether the expert has come to the fork.
        """
        try:
            unread: Unread = torch.Tensor._make_subclass(Unread, value)
        except RuntimeError:  # torch makes no other tensor of a fake one
            if detect_fake_mode(value) is None:
                raise
            return value  # which has no values that somebody could read
        unread.key, unread.forked = key, forked
        return unread

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A module may keep it as an attribute, and be copied or saved as a whole."""
        return _unread_again(*self._parts())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unread_again, self._parts()

    def _parts(self) -> tuple[tuple[int, ...], torch.dtype, str]:
        return tuple(self.shape), self.dtype, self.key

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if not reads(func, result):
            return result
        unread = next(t for t in tensors_in((args, kwargs)) if isinstance(t, Unread))
        key, forked = unread.key, unread.forked
        stays = func in _SAME or not forked()
        if stays and holds_tensors(result):
            return map_tensors(lambda tensor: Unread.of(tensor, key, forked), result)
        returned = "an argument" if key == "inputs" else f"what `{key}` returned before the fork"
        raise ReplayError(
            f"Somebody reads {returned}, which no expert read when the model was wrapped, so that "
            'it was not kept. If it comes from `return_experts="outputs"`, for a stored state of '
            "the trunk: pass the batch itself, of which everything is kept. If an expert's forward "
            "reads it, something decides that which was different then, an attribute that was set "
            "since, say. Set it before wrapping, and load this model's `state_dict()` into the "
            "new one; or let the forward take it as an argument, which may differ between calls."
        )


def _unread_again(shape: tuple[int, ...], dtype: torch.dtype, key: str) -> Tensor:
    value = torch.full((), float("nan")).to(dtype).expand(shape)
    return Unread.of(value, key, _has_run)


def _has_run() -> bool:
    return True
