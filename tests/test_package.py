"""What the package is from outside: its imports, its version, its wheel, its layers."""

import ast
import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ride_plugin

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ride_plugin"
SOURCES = sorted(PACKAGE.rglob("*.py"))

CHECKS = {f"ride_plugin._checks{name}" for name in ("", "._single", "._tensors", "._values")}
GROUND = {  # knows nothing of models
    *CHECKS,
    "ride_plugin._closeness",
    "ride_plugin._errors",
    "ride_plugin._numerics",
    "ride_plugin._output",
    "ride_plugin._schedule",
    "ride_plugin.functional",
}


@functools.cache
def loaded_after(statement: str) -> frozenset[str]:
    """Top-level modules that are neither built in nor ours after ``statement`` in a new process."""
    code = (
        f"import sys; {statement}; "
        "print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(result.stdout.split()) - {"ride_plugin"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that ``path`` imports anywhere but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute in this package"
            # `from ride_plugin import functional` reads a module, `... import Name` its namespace.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return {name for name in found if name.split(".")[0] == "ride_plugin"}


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def reachable_from(name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for imported in GRAPH.get(waiting.pop(), set()) - found:
            found.add(imported)
            waiting.append(imported)
    return found


def loaded_by_the_required() -> frozenset[str]:
    """What the modules of torch, numpy and typing_extensions bring in that the package imports."""
    required = {"torch", "numpy", "typing_extensions"}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            required |= {name for name in names if name.split(".")[0] in required}
    return loaded_after(f"import {', '.join(sorted(required))}")


def test_importing_brings_in_no_package_beyond_the_three_it_requires() -> None:
    allowed = loaded_by_the_required()
    assert {"torch", "numpy"} <= allowed
    assert loaded_after("import ride_plugin") - allowed == set()


def test_optional_subpackages_import_nothing_more_either() -> None:
    allowed = loaded_by_the_required()
    public = [name for name in MODULES if not any(p.startswith("_") for p in name.split("."))]
    assert "ride_plugin.longtail" in public
    assert loaded_after(f"import {', '.join(public)}") - allowed == set()


def test_version_is_that_of_the_metadata_and_of_the_changelog() -> None:
    assert importlib.metadata.version("ride-plugin") == ride_plugin.__version__
    heading = "Unreleased" if "dev" in ride_plugin.__version__ else ride_plugin.__version__
    assert f"## [{heading}]" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_torch_numpy_and_typing_extensions() -> None:
    required = [
        line.split(";")[0].split(">")[0].strip()
        for line in importlib.metadata.requires("ride-plugin") or []
        if "extra ==" not in line
    ]
    assert sorted(required) == ["numpy", "torch", "typing-extensions"]


def test_every_public_name_exists_and_is_documented() -> None:
    for name in ride_plugin.__all__:
        if name != "__version__":
            assert (getattr(ride_plugin, name).__doc__ or "").strip(), name


def test_imports_of_the_package_have_no_cycle() -> None:
    order = list(TopologicalSorter(GRAPH).static_order())
    assert order.index("ride_plugin._errors") < order.index("ride_plugin._wrapper")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_users_import_the_public_namespace(name: str) -> None:
    assert "ride_plugin" not in GRAPH[name], "import from the module that defines the name"


def floors_above(name: str, *floors: str) -> set[str]:
    """What ``name`` reaches of the packages or modules called ``floors``."""
    return {n for n in reachable_from(name) if n.split(".")[1] in floors}


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("ride_plugin.losses")))
def test_losses_know_neither_wrapper_nor_splitter(name: str) -> None:
    assert floors_above(name, "_wrapper", "_construct", "_split", "_width", "routing") == set()


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("ride_plugin.longtail")))
def test_longtail_knows_neither_wrapper_nor_splitter(name: str) -> None:
    assert floors_above(name, "_wrapper", "_construct", "_split", "_width", "routing") == set()


def test_the_equations_stand_on_the_ground() -> None:
    assert set(MODULES) > GROUND
    assert reachable_from("ride_plugin.functional") == {
        *CHECKS,
        "ride_plugin._errors",
        "ride_plugin._numerics",
    }
    for name in GROUND:
        assert reachable_from(name) <= GROUND, name


def test_the_splitter_imports_the_ground_only() -> None:
    inside = "ride_plugin._split"
    for name in MODULES:
        if name.startswith(inside):
            outside = {n.split(".")[1] for n in GRAPH[name] if not n.startswith(inside)}
            ground = {"_checks", "_closeness", "_compiler", "_contexts", "_cosine", "_distributed"}
            assert outside <= ground | {"_errors", "_inputs", "_names_read", "_tree"}, name


@pytest.mark.parametrize(
    "package",
    [
        *("_checks", "_initialise", "_split", "_width", "losses", "routing"),
        *sorted(f"_split/{path.parent.name}" for path in PACKAGE.glob("_split/*/__init__.py")),
    ],
)
def test_the_map_of_a_package_names_each_of_its_files(package: str) -> None:
    folder = PACKAGE / package
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    described = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert set(re.findall(r"``(_\w+)``", described or "")) == files | packages


def test_packages_of_the_splitter_import_those_that_its_map_names_first() -> None:
    inside = "ride_plugin._split"
    described = ast.get_docstring(ast.parse(MODULES[inside].read_text())) or ""
    order = re.findall(r"``(_\w+)``", described)
    for name in MODULES:
        if name.startswith(f"{inside}._"):
            place = order.index(name.split(".")[2])
            below = {n.split(".")[2] for n in GRAPH[name] if n.startswith(f"{inside}._")}
            if place <= order.index("_ways"):
                assert below <= set(order[: place + 1]), name


def test_narrowing_knows_the_splitter_and_nothing_above_it() -> None:
    for name in MODULES:
        if name.startswith("ride_plugin._width"):
            assert floors_above(name, "_wrapper", "_construct", "losses", "routing") == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_outside_a_package_imports_its_private_modules(name: str) -> None:
    for imported in GRAPH[name]:
        parts = imported.split(".")
        if len(parts) > 2 and parts[-1].startswith("_"):
            home = ".".join(parts[:-1])
            assert name == home or name.startswith(home + "."), imported


TORCHS_OWN = {  # private in name, but the only way to what torch keeps there
    "_backward_hooks",
    "_backward_pre_hooks",
    "_buffers",
    "_call_impl",
    "_cdata",
    "_flat_weight_refs",
    "_flat_weights",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_load_from_state_dict",
    "_load_state_dict_pre_hooks",
    "_modules",
    "_non_persistent_buffers_set",
    "_parameters",
    "_qkv_same_embed_dim",
    "_schema",
    "_torchdynamo_disable",
    "_tracer_cls",
    "_version",
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_touches_the_private_fields_of_another_object(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    touched = {
        f"{ast.unparse(node)} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in TORCHS_OWN
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and not ast.unparse(node.value).startswith(("super(", "torch", "nn.modules", "sys"))
    }
    imported = {
        f"{alias.name} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ride_plugin")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    }
    assert touched | imported == set()


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "ride_plugin"])
def test_only_tests_import_tests(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "tests" not in {name.split(".")[0] for name in names}, path


def test_the_wheel_holds_the_package_with_py_typed_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # A copy: building in place would leave files in the working tree, or pick up stale ones.
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for directory in ("ride_plugin", "tests", "examples", "docs"):
        shutil.copytree(
            ROOT / directory, source / directory, ignore=shutil.ignore_patterns("__pycache__")
        )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        capture_output=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"ride_plugin-{ride_plugin.__version__}.dist-info/"
    package = {str(path.relative_to(ROOT)) for path in SOURCES} | {"ride_plugin/py.typed"}
    assert {name for name in held if not name.startswith(metadata)} == package
