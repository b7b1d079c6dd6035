"""Regenerate docs/evidence/coverage.md: every check on every architecture of the zoo.

python -m benchmarks.coverage [--only NAME ...] [--cache FILE] [--jobs 1]

Each architecture runs in a process of its own. Results are kept in the cache file, so a run that
was interrupted goes on where it stopped; delete the file to run everything again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.coverage.run import run_all
from benchmarks.coverage.table import write_page
from benchmarks.coverage.zoo import zoo

_PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "coverage.md"


def main() -> None:
    """Run what the cache does not hold, then write the page if nothing is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="run keys that contain one of these again")
    parser.add_argument("--cache", type=Path, default=Path("coverage-zoo.json"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one architecture")
    parser.add_argument("--failed", action="store_true", help="run what is not green again")
    options = parser.parse_args()
    results = json.loads(options.cache.read_text()) if options.cache.exists() else {}
    architectures = zoo()
    chosen = [
        a
        for a in architectures
        if (a.key not in results and not options.only)
        or (options.only and any(part in a.key for part in options.only))
        or (options.failed and a.key in results and results[a.key]["failed"])
    ]
    for key, result in run_all(chosen, options.jobs, options.limit):
        results[key] = result
        options.cache.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        failed = "; ".join(f"{check}: {why}" for check, why in result["failed"].items())
        print(f"{key:55} {result['seconds']:6.1f} s  {result.get('fork', '-'):24} {failed}")
    missing = [a.key for a in architectures if a.key not in results]
    if missing:
        print(f"{len(missing)} architectures have no result yet; the page is left as it is.")
    else:
        write_page(_PAGE, architectures, results)
        print(f"wrote {_PAGE}")


if __name__ == "__main__":
    main()
