"""Where to fork: the default fork point, and the one the user names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ride_plugin._errors import SplitError
from ride_plugin._split._examine._probe import Call
from ride_plugin._split._examine._units import tokens, units_of

_NEW_LEVEL = 0.6  # a resolution level starts where the positions fall to this share or below
_LEAST_TRUNK = 0.1  # of the multiply-adds
_MOST_TRUNK = 0.97


@dataclass(frozen=True)
class Fork:
    """The units of a backbone and the index of the first forked one."""

    units: list[Call]
    index: int
    name: str
    reason: str

    @property
    def doubt(self) -> str | None:
        """Why this fork makes little sense, in words; None where it does."""
        if not any(unit.num_parameters for unit in self.units[: self.index]):
            return (
                "no layer with weights runs before it, so that the experts share no computation "
                "and each costs as much as the backbone. Pass `fork_at=` a later submodule"
            )
        share = _trunk_share(self.units, self.index)
        if share >= _MOST_TRUNK:
            return (
                f"{share:.1%} of the multiply-adds run before it, so that the experts differ in "
                "the rest alone. Pass `fork_at=` an earlier submodule"
            )
        return None


def choose_fork(root: Call, fork_at: str | None) -> Fork:
    """Return the fork point: the one named, or by default as the authors chose for ResNets.

    The default forks the last two resolution levels if there are three or more and the trunk keeps
    at least a tenth of the multiply-adds (CIFAR ResNet: after ``layer1``; ImageNet ResNet: after
    ``layer2``), else the last level, else the last third of the dominant run of equal blocks.

    Raises:
        SplitError: ``fork_at`` names no submodule that the forward calls.
    """
    if fork_at is not None:
        return _named_fork(root, fork_at)
    units = units_of(root)
    if not any(unit.num_parameters for unit in units):
        raise SplitError(
            "The backbone calls no submodule with parameters, so there is nothing to fork. Wrap a "
            "torch.nn.Module built from submodules."
        )
    index, reason = _default(units)
    if id(units[index].module) in _modules_of(units[:index]):
        # The forward runs all its layers more than once, over several views of an image say. The
        # first time says where to fork; what runs later then belongs to the experts.
        index, reason = _default(units[: _first_repeated(units)])
    return Fork(units, index, _stage_name(units, index), reason)


def _default(units: Sequence[Call]) -> tuple[int, str]:
    parametric = [unit.num_parameters > 0 for unit in units]
    last = max(i for i, has in enumerate(parametric) if has)  # the classifier, or ends in it
    last = _first_scorer(units, last)
    index, reason = _by_resolution(units, parametric, last) or _by_blocks(units, last)
    # Parameter-free units cost nothing to share; a module that also ran before cannot be forked.
    called_before = _modules_of(units[:index])
    while index < last and (not parametric[index] or id(units[index].module) in called_before):
        called_before |= _modules_of(units[index : index + 1])
        index += 1
    return _first_branch(units, index), reason


def _first_scorer(units: Sequence[Call], last: int) -> int:
    """Index of the first of the layers that each score one class, if the last unit is such a layer.

    They are one classifier: cut between them, experts would share the scores of some classes. (If
    all of them take one value, they are branches as well.)
    """
    container, shape = units[last].name.rpartition(".")[0], units[last].shape
    if shape is None or len(shape) != 2 or shape[1] != 1 or not container:
        return last
    first = last
    for i in range(last - 1, -1, -1):
        unit = units[i]
        if unit.num_parameters:
            same = unit.shape == shape and type(unit.module) is type(units[last].module)
            if not same or unit.name.rpartition(".")[0] != container:
                break
            first = i
    return first


def _first_branch(units: Sequence[Call], index: int) -> int:
    """Index of the first of several branches that take one value, among which is this unit.

    They are called one after the other, as the kernel sizes of a text CNN are; cut between them,
    experts would differ in some alone. A value that each changes in place is another for each. A
    module that ran before as well cannot be forked here.
    """
    unit, first = units[index], index
    if not unit.inputs or unit.version is None:
        return index
    for i in range(index - 1, -1, -1):
        if units[i].num_parameters:
            if units[i].inputs != unit.inputs or units[i].version != unit.version:
                return first
            if id(units[i].module) not in _modules_of(units[:i]):
                first = i
    return index  # nothing is shared before the first


def _first_repeated(units: Sequence[Call]) -> int:
    """Index of the first unit with parameters whose module ran before."""
    seen: set[int] = set()
    for index, unit in enumerate(units):
        if unit.num_parameters and id(unit.module) in seen:
            return index
        seen |= _modules_of([unit])
    return len(units)


def _named_fork(root: Call, fork_at: str) -> Fork:
    names = [name for name, _ in root.module.named_modules() if name]
    if fork_at not in names:
        near = difflib.get_close_matches(fork_at, names, n=3, cutoff=0.4)
        raise SplitError(
            f"Expected argument `fork_at` to name a submodule of the backbone, but {fork_at!r} is "
            f"none. Near matches: {near or 'none'}. Names are those of `named_modules()`, for "
            f"example {_examples(root)}."
        )
    units = units_of(root, must_expand=lambda call: fork_at.startswith(call.name + "."))
    for index, unit in enumerate(units):
        if unit.name == fork_at or unit.name.startswith(fork_at + "."):
            if id(unit.module) in _modules_of(units[:index]):
                break
            return Fork(units, index, fork_at, "given")
    raise SplitError(
        f"Expected argument `fork_at` to name a submodule that the backbone's forward calls, but "
        f"{fork_at!r} is not called, or only inside another block. Pass one of "
        f"{[unit.name for unit in units if unit.num_parameters]}."
    )


def _by_resolution(
    units: Sequence[Call], parametric: Sequence[bool], last: int
) -> tuple[int, str] | None:
    """Fork at the start of a resolution level, if levels leave enough of the work to the trunk."""
    levels: list[tuple[int, bool]] = []  # (index of the first unit, has weight matrices)
    current: int | None = None
    for i, unit in enumerate(units[:last]):
        positions = tokens(unit)
        if positions is None or unit.shape is None or len(unit.shape) <= 2:
            continue
        if positions == 1 and (not parametric[i] or len(unit.shape) == 3):
            break  # global pooling or a class token: the head begins here
        if current is None or positions <= _NEW_LEVEL * current:
            levels.append((i, False))
            current = positions
        if _has_matrix(unit):
            levels[-1] = (levels[-1][0], True)
    starts = [start for start, has_weights in levels if has_weights]
    for kept, reason in ((2, "last two"), (1, "last")):
        if len(starts) > kept and _trunk_share(units, starts[-kept]) >= _LEAST_TRUNK:
            return starts[-kept], f"{reason} of {len(starts)} resolution levels"
    return None


def _by_blocks(units: Sequence[Call], last: int) -> tuple[int, str]:
    """Fork the last third of the heaviest run of equal blocks, or of all units with parameters."""
    # A unit without a weight matrix (BatchNorm after its convolution) is no place to begin.
    body = [i for i in range(last) if _has_matrix(units[i])]
    if not body:
        return last, "classifier only"
    runs: dict[type, list[int]] = {}
    for i in body:
        runs.setdefault(type(units[i].module), []).append(i)
    run = max(runs.values(), key=lambda r: (sum(units[i].multiply_adds for i in r), len(r)))
    if len(run) < 3:
        return body[-max(1, round(len(body) / 3))], f"last third of {len(body)} units"
    kind = type(units[run[0]].module).__name__
    return run[-max(1, round(len(run) / 3))], f"last third of {len(run)} {kind} blocks"


def _modules_of(units: Sequence[Call]) -> set[int]:
    """Ids of the modules that these units call, themselves and whatever is inside."""
    return {id(call.module) for unit in units for call in unit.walk()}


def _has_matrix(unit: Call) -> bool:
    return any(p.dim() >= 2 for p in unit.module.parameters())


def _trunk_share(units: Sequence[Call], index: int) -> float:
    work = [unit.multiply_adds for unit in units]
    return sum(work[:index]) / max(1, sum(work))


def _stage_name(units: Sequence[Call], index: int) -> str:
    """The outermost submodule that starts at the fork: ``layer2`` rather than ``layer2.0``."""
    name = units[index].name
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if not any(unit.name.startswith(prefix) for unit in units[:index]):
            return prefix[:-1]
    return name


def _examples(root: Call) -> list[str]:
    return [unit.name for unit in units_of(root) if unit.num_parameters][:6]
