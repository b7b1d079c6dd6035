"""Changes the library's source in one place at a time, and counts how many changes a test notices.

`python -m benchmarks.mutants --number 300 --seed 0` from the repository's root. A mutant is one
change of one expression or statement (a comparison, an operator, a number, a condition, a default,
a cast, a call left out) in the equations, their numerics, the losses, routing, the long-tail losses
or the sampler. It is killed if a test that concerns its module fails or takes too long.

Not changed are annotations, docstrings, messages, imports, overloads, ``__all__``, ``repr`` and
zip's ``strict``. Some changes cannot be noticed by any test, for example a shortcut that is not
taken; those that were found are listed with the reason in `mutants_equivalent.txt`. They are
counted apart and never as killed.

``--log FILE`` keeps a line of JSON for each mutant, and a second run goes on from it; with
``--again`` the file's mutants are the sample, and those that survived run once more. Mutants are
known by the function that they are in, so the file stays valid while other functions change. Every
mutant runs in a process of its own, forked after torch was imported; no file is changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.txt")
_BEFORE_THE_FORK = (  # imported once, so that no mutant pays for it
    "hypothesis", "numpy", "onnx", "onnxruntime", "onnxscript", "sybil", "torch._dynamo",
    "torch._inductor", "torch.distributed", "torch.export", "torch.onnx", "torch.testing",
    "torch.utils.flop_counter",
)  # fmt: skip
TESTS = {  # module -> the tests that mirror it, nearest first
    "functional": (
        "test_functional.py",
        *(f"losses/test_{name}.py" for name in ("diversity", "temperature", "distillation")),
        "routing/test_router.py",
        "routing/test_exit.py",
        "test_hostile_calls.py",
        "test_devices.py",
        "test_properties.py",
    ),
    "_numerics": ("test_functional.py", "losses/test_diversity.py", "test_properties.py"),
    "losses/*": (
        "losses/test_{}.py", "test_functional.py", "test_hostile_calls.py", "test_devices.py"
    ),
    **{
        f"longtail/_{name}": (
            f"longtail/test_{name}.py", "test_hostile_calls.py", "test_devices.py"
        )
        for name in ("ldam", "focal", "logit_adjustment", "reweighting", "sampler")
    },
    "routing/_call": ("routing/test_call.py",),
    "routing/_runner": ("routing/test_export.py", "routing/test_call.py"),
    "routing/_measure": ("routing/test_threshold.py", "routing/test_exit.py", "test_devices.py"),
    "routing/_fused": ("routing/test_fused.py",),
    "routing/_fused_conv": ("routing/test_fused.py",),
    "routing/_rewrite": ("routing/test_fused.py", "routing/test_rewrite.py"),
    "routing/_memory": ("routing/test_rewrite.py",),
    "routing/_int8": ("routing/test_int8.py",),
    "routing/_own": ("routing/test_export.py",),
    "routing/_stage_inputs": ("routing/test_export.py", "routing/test_fused.py"),
    "routing/_stages": ("routing/test_stages.py", "routing/test_int8.py"),
    "routing/*": (
        "routing/test_{}.py", "routing/test_router.py", "routing/test_exit.py",
        "routing/test_inference.py", "test_hostile_models.py", "test_devices.py",
    ),
}  # fmt: skip
_ELSEWHERE = {"__init__"}
_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_NAMES = {
    "sum": "mean", "mean": "sum", "min": "max", "max": "min", "amax": "amin", "amin": "amax",
    "any": "all", "all": "any", "softmax": "log_softmax", "log_softmax": "softmax", "log": "exp",
    "exp": "log", "ones": "zeros", "zeros": "ones", "argmax": "argmin", "clamp_min": "clamp_max",
}  # fmt: skip
_CASTS = {"detach", "float", "double", "to", "contiguous", "clone", "clamp", "clamp_min", "abs"}
_MESSAGES = {"refuse", "ArgumentError", "MissingExpertLogitsError", "ValueError", "warn"}


@dataclass(frozen=True)
class Mutant:
    """One change: the module, its function and line, what was changed, the module's new source."""

    path: str
    function: str
    line: int
    change: str
    source: str

    @property
    def name(self) -> str:
        """What the mutant is known by, whatever is written above it in the module."""
        return f"{self.path} {self.function}: {self.change}"


_SCOPES = (ast.FunctionDef, ast.ClassDef)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a source file."""
    text, shown_before = path.read_text(), Counter[tuple[str, str]]()
    places = list(_places(ast.parse(text)))
    for place, (node, _, function) in enumerate(places):
        for choice in range(len(list(_changes(node)))):
            tree = ast.parse(text)
            node, parent, _ = list(_places(tree))[place]
            old, line = ast.unparse(node), getattr(node, "lineno", 0)
            new = list(_changes(node))[choice]
            _replace(parent, node, new)
            mutated = ast.unparse(ast.fix_missing_locations(tree))
            change = " ".join(f"{old} -> {ast.unparse(new)}".split())[:160]
            shown_before[function, change] += 1
            if shown_before[function, change] > 1:
                change += f" ({shown_before[function, change]})"
            yield Mutant(path.relative_to(ROOT).as_posix(), function, line, change, mutated)


def _places(node: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, ast.AST, str]]:
    """Every node that may be changed, its parent and the function that it is in.

    No annotation, docstring or message is changed.
    """
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_text(child):
                continue
            yield child, node, function
            inner = getattr(child, "name", "") if isinstance(child, _SCOPES) else ""
            yield from _places(child, f"{function}.{inner}".strip(".") if inner else function)


def _is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return True  # of zip: an assertion about this library's own lists
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).split(".")[-1] in _MESSAGES
    skipped = (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Raise)
    typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    public = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    representation = isinstance(node, ast.FunctionDef) and (
        node.name in ("extra_repr", "__repr__")
        or any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)
    )
    return isinstance(node, skipped) or typing or public or representation


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in _COMPARE:
        new.ops[0] = _COMPARE[type(new.ops[0])]()
        yield new
    elif isinstance(new, ast.BinOp | ast.AugAssign) and type(new.op) in _OPERATORS:
        new.op = _OPERATORS[type(new.op)]()
        yield new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        yield new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        yield ast.Constant(new.value + 1 if isinstance(new.value, int) else new.value * 2 + 0.25)
    elif isinstance(new, ast.If | ast.IfExp | ast.While):
        for value in (True, False) if not isinstance(new, ast.While) else (False,):
            other = copy.deepcopy(new)
            other.test = ast.Constant(value)
            yield other
    elif isinstance(new, ast.Expr) and isinstance(new.value, ast.Call):
        yield ast.Pass()
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Attribute):
        if new.func.attr in _CASTS:
            yield new.func.value
        if new.func.attr in _NAMES:
            new.func.attr = _NAMES[new.func.attr]
            yield new
    elif isinstance(new, ast.Call) and isinstance(new.func, ast.Name) and new.func.id in _NAMES:
        new.func.id = _NAMES[new.func.id]
        yield new


def _replace(parent: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list):
            setattr(parent, name, [new if item is old else item for item in value])


class _Loader(importlib.abc.SourceLoader):
    """Gives a module the mutant's source, and knows of no bytecode that could be stale."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def get_filename(self, fullname: str) -> str:
        return str(ROOT / self.mutant.path)

    def get_data(self, path: str | bytes) -> bytes:
        return self.mutant.source.encode()


class _Finder(importlib.abc.MetaPathFinder):
    """Imports the mutant instead of the module."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = mutant.path.removesuffix(".py").replace("/", ".")

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        loader = _Loader(self.mutant)
        return importlib.util.spec_from_file_location(name, ROOT / self.mutant.path, loader=loader)


def tests_of(path: str) -> list[str]:
    """The mirroring tests, nearest first, and the module's own doctests."""
    inner = path.removeprefix("ride_plugin/").removesuffix(".py")
    folder, _, module = inner.rpartition("/")
    patterns = TESTS.get(inner) or TESTS[f"{folder}/*"]
    files = [ROOT / "tests" / pattern.format(module.strip("_")) for pattern in patterns]
    files.append(ROOT / "tests/test_public_names.py")  # signatures with their defaults
    return list(dict.fromkeys([str(ROOT / path), *(str(f) for f in files if f.exists())]))


def passes(mutant: Mutant, limit: float) -> tuple[bool, float]:
    """Whether the tests pass on the mutant in a process of its own, and the seconds they took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.meta_path.insert(0, _Finder(mutant))
        options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider"]
        os._exit(int(pytest.main([*options, *tests_of(mutant.path)])))
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0, time.monotonic() - began
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, limit


def unnoticeable() -> dict[str, str]:
    """The reason why no test can notice a mutant, by the mutant's name."""
    lines = (line for line in EQUIVALENT.read_text().splitlines() if not line.startswith("#"))
    return {name: reason for name, _, reason in (line.partition("  #  ") for line in lines if line)}


def main() -> None:
    """Sample, run, print every survivor and the share that was killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one mutant")
    parser.add_argument("--log", type=Path, help="a line of JSON for each mutant; goes on from it")
    parser.add_argument("--part", default="1/1", help="1/3 and so on: processes share one --log")
    parser.add_argument("--only", default="", help="draw from names that contain this text")
    parser.add_argument("--again", action="store_true", help="run the survivors of --log once more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths: list[Path] = []
    for pattern in TESTS:
        paths += sorted((ROOT / "ride_plugin").glob(f"{pattern}.py"))
    paths = [path for path in dict.fromkeys(paths) if path.stem not in _ELSEWHERE]
    everything = [mutant for path in paths for mutant in mutants_of(path)]
    drawn_from = [mutant for mutant in everything if options.only in mutant.name]
    sample = random.Random(options.seed).sample(drawn_from, min(options.number, len(drawn_from)))
    part, parts = map(int, options.part.split("/"))
    known: dict[str, bool] = {}
    if options.log and options.log.exists():
        for entry in map(json.loads, options.log.read_text().splitlines()):
            known[entry["name"]] = entry["killed"]
    if options.again:
        sample = [mutant for mutant in drawn_from if mutant.name in known]
        gone = len(known) - len(sample)
        print(f"{gone} of the log's {len(known)} mutants are of code that has changed since")
    sample = sample[part - 1 :: parts]
    print(f"{len(drawn_from)} mutants, {len(sample)} of them drawn", flush=True)
    for module in _BEFORE_THE_FORK:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    reasons, found = unnoticeable(), Counter[str]()
    for mutant in sample:
        killed = known.get(mutant.name)
        if mutant.name in reasons:
            found["unnoticeable"] += 1
            continue
        if killed is None or (options.again and not killed):
            survived, seconds = passes(mutant, options.limit)
            killed = not survived
            if options.log:
                entry = {"name": mutant.name, "killed": killed, "seconds": round(seconds, 1)}
                with options.log.open("a") as log:
                    log.write(json.dumps(entry) + "\n")
        found["killed" if killed else "survived"] += 1
        if not killed:
            print(f"SURVIVED {mutant.name}  (line {mutant.line})", flush=True)
    for path in sorted({mutant.path for mutant in sample}):  # what fails unchanged kills nothing
        unchanged = Mutant(path, "", 0, "no change", (ROOT / path).read_text())
        if not passes(unchanged, options.limit)[0]:
            raise SystemExit(f"the tests of {path} fail without any change: {tests_of(path)}")
    run = found["killed"] + found["survived"]
    print(
        f"{found['killed']} of {run} killed ({100 * found['killed'] / max(1, run):.1f} %), "
        f"{found['unnoticeable']} more are listed as unnoticeable"
    )


if __name__ == "__main__":
    main()
