"""Run the tests under several Python and torch versions: ``python tools/matrix.py 3.10:2.5.1 ...``.

Each pair of an interpreter (``python3.10`` on the path, or a file) and a torch version gets an
environment under ``--folder``, which is removed after its run unless ``--keep`` is given; one that
is there already is used. The versions of the other packages are the newest that fit. A row for
each pair is printed as Markdown.

``--without-accelerator`` installs torch without the accelerator libraries that its Linux builds
require, several gigabytes, and puts empty libraries of the same names beside it, so that it imports
and runs on the CPU. A C compiler and `readelf` are needed for that.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_NEEDS = ["filelock", "fsspec", "jinja2", "networkx", "sympy", "mpmath", "typing-extensions"]
TESTS_NEED = [
    "build",
    "hypothesis",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pytest",
    "pytest-timeout",
    "scikit-learn",
    "setuptools>=70.1",  # builds wheels by itself
    "sybil",
    "tqdm",
    "matplotlib",
]
ACCELERATOR = re.compile(r"lib(cu|nv|nccl)")
_MARK = 'const char stand_in[] = "stand-in";\n'


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output."""
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, **options)


def make(folder: Path, interpreter: str, torch: str, without_accelerator: bool) -> Path:
    """An environment with that torch and what the tests need; returns its Python."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    run(shutil.which(interpreter) or interpreter, "-m", "venv", folder, check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    if without_accelerator:
        run(*pip, "--no-deps", f"torch=={torch}", check=True)
        run(*pip, *TORCH_NEEDS, check=True)
        stand_ins(next(folder.glob("lib/python3*/site-packages/torch/lib")))
    else:
        run(*pip, f"torch=={torch}", check=True)
    run(*pip, *TESTS_NEED, check=True)
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT, check=True)
    return python


def stand_ins(folder: Path) -> None:
    """Make a library for every missing one, with the names that torch's libraries ask it for."""
    files = [*folder.glob("*.so*"), *folder.parent.glob("*.so")]
    needed: set[str] = set()
    versioned: dict[str, set[str]] = defaultdict(set)
    asked: set[str] = set()
    offered: set[str] = set()
    for file in files:
        needed.update(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", file).stdout))
        for line in run("readelf", "--dyn-syms", "--wide", file).stdout.splitlines():
            fields = line.split()
            if len(fields) < 8 or fields[0] == "Num:":
                continue
            name, _, version = fields[7].partition("@")
            if fields[6] != "UND":
                offered.add(name)
            elif version:
                versioned[version].add(name)
            else:
                asked.add(name)
    missing = [n for n in sorted(needed) if ACCELERATOR.match(n) and not (folder / n).exists()]
    for library in missing:
        stem = library.split(".so")[0]
        nodes = {
            version: names
            for version, names in versioned.items()
            if version.startswith(f"{stem}.so") or version.lower() == stem.split("_")[0][3:]
        }
        # Names without a version are looked for in every library: one that offers all will do.
        loose = asked - offered if library == missing[0] else set()
        names = sorted(set().union(loose, *nodes.values()))
        source = _MARK + "".join(f"int {name}(void) {{ return 100; }}\n" for name in names)
        script = "".join(f"{v} {{ global: {'; '.join(sorted(n))}; }};\n" for v, n in nodes.items())
        (folder / "stand_in.c").write_text(source)
        (folder / "stand_in.map").write_text(script)
        options = [f"-Wl,--version-script={folder}/stand_in.map"] if script else []
        target = ["-o", folder / library, f"-Wl,-soname,{library}", folder / "stand_in.c"]
        run("cc", "-shared", "-fPIC", "-w", "-fno-builtin", *options, *target, check=True)


def main() -> None:
    """Make, run and report each environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:TORCH")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ride-plugin-matrix"))
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--without-accelerator", action="store_true")
    parser.add_argument("--tests", nargs="+", default=["tests", "ride_plugin", "docs", "README.md"])
    arguments = parser.parse_args()
    print("| Python | torch | passed | failed | skipped |\n|---|---|---|---|---|")
    failed = False
    for pair in arguments.pairs:
        version, _, torch = pair.partition(":")
        interpreter = version if "/" in version else f"python{version}"
        folder = arguments.folder / f"{Path(version).name}-{torch}"
        python = make(folder, interpreter, torch, arguments.without_accelerator)
        command = [python, "-m", "pytest", "-q", "-m", "not slow and not reference"]
        result = run(*command, *arguments.tests, cwd=ROOT)
        found = re.findall(r"(\d+) (passed|failed|skipped)", result.stdout.splitlines()[-1])
        counts = {kind: number for number, kind in found}
        cells = [counts.get(kind, "0") for kind in ("passed", "failed", "skipped")]
        print(f"| {version} | {torch} | {' | '.join(cells)} |", flush=True)
        (arguments.folder / f"{folder.name}.log").write_text(result.stdout + result.stderr)
        failed |= result.returncode != 0
        if not arguments.keep:
            shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
