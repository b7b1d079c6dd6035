"""Loading, saving and moving a module whose experts hold some tensors together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from ride_plugin._split._copying import complete_shared
from ride_plugin._split._replay import versions_in
from ride_plugin._split._saving._lend import Lent, lend_entries
from ride_plugin._split._saving._pair import Pair
from ride_plugin._split._saving._passed_by import tells
from ride_plugin._split._saving._plain_state import (
    refuse_plain_state,
    tell_of_nothing_loaded,
    tell_of_nothing_new,
)


class Holder(nn.Module):
    """A wrapped model, or one of the two modules of a pair: a part of it with parts of all experts.

    State that is neither a wrapped model's nor a half's alone has names that begin with ``ride_``:
    any other may be one of the plain module's, and is set in its parts.

    What replaces tensors replaces each by itself; afterwards they are held together again.

    Attributes:
        experts: one module for each expert.
    """

    experts: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        # The versions of all tensors when the state was last asked for.
        self.ride_versions: list[int | None] = []
        self.ride_lent: Lent | None = None  # while a state is loaded
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]

    def note_shared(self) -> None:
        """Note which tensors of the model are held together, before they are replaced."""

    def relink(self) -> None:
        """Follow tensors that something has replaced, and hold together what was before."""

    def follow_with_inputs(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Let what belongs to this module's tensors follow them: ``fn`` has moved or cast these."""

    def parts_by_prefix(self) -> dict[str, nn.Module]:
        """Trunk and experts by the prefix of their names, or what this module holds of them."""
        return {f"experts.{index}.": expert for index, expert in enumerate(self.experts)}

    def own_parts(self) -> list[nn.Module]:
        """The modules that are of the wrapped module's class; of a pair, of its two classes."""
        parts = self.parts_by_prefix().values()
        return [own for part in parts for own in (part, *_halves_of(part))]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As for any module."""
        self.ride_versions = versions_in([*self.parameters(), *self.buffers()])
        return super().state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As for any module; a tensor that experts share may stand under one expert's name only.

        With ``strict=False`` its other names are reported as missing, as torch does for tied
        weights.

        Raises:
            CheckpointError: it holds different values for experts that share a tensor here, or is
                one of the plain backbone, or has a prefix before every name.
        """
        if strict:
            state_dict = copy.copy(state_dict)
            complete_shared(state_dict, "", self.experts, fill=True)
        elif not state_dict:
            tell_of_nothing_new(state_dict, "", self)
        found = super().load_state_dict(state_dict, strict, assign)
        tell_of_nothing_loaded(state_dict, found.unexpected_keys)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Somebody's hooks run in it, which may rename entries; the parts load theirs only later.
        super()._load_from_state_dict(state_dict, prefix, *rest)
        refuse_plain_state(state_dict, prefix, self)
        # A state without entries may be that of a module around this one, which loads only others;
        # and something may have written into the tensors since the state was asked for, as
        # torch.distributed.checkpoint does.
        if state_dict and self.ride_versions == versions_in([*self.parameters(), *self.buffers()]):
            tell_of_nothing_new(state_dict, prefix, self)
        complete_shared(state_dict, prefix, self.experts, fill=False)
        self.note_shared()  # `assign=True` replaces each tensor by itself
        self.ride_lent = lend_entries(state_dict, prefix, self.parts_by_prefix())

    def after_loading(self, keys: Any) -> None:
        """Called with torch's missing and unexpected names, when all parts have loaded theirs."""
        self.relink()
        if self.ride_lent is not None:
            self.ride_lent.take_back(keys.unexpected_keys)
            self.ride_lent = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.note_shared()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.follow_with_inputs(fn)
        self.relink()
        return self


tells(Holder)


def _halves_of(part: nn.Module) -> list[nn.Module]:
    return list(part.children()) if isinstance(part, Pair) else []


def _after_loading(module: Holder, keys: Any) -> None:
    module.after_loading(keys)
