"""The figures of the results, which are drawn from numbers that their pages state."""

import json
from pathlib import Path

from benchmarks import figures

ROOT = Path(__file__).resolve().parents[1]


def test_every_figure_is_drawn_and_shown(tmp_path: Path) -> None:
    figures.main(tmp_path)
    page = (ROOT / "docs" / "evidence" / "results.md").read_text()
    page += (ROOT / "docs" / "index.md").read_text()
    for file in figures.FOLDER.iterdir():
        assert f"figures/{file.name})" in page
        assert (tmp_path / file.name).read_text().startswith("<?xml")


def test_every_number_of_the_figures_stands_on_a_page() -> None:
    results = ROOT / "docs" / "evidence" / "results"
    pages = [results.with_suffix(".md"), *sorted(results.glob("*.md"))]
    page = "\n".join(path.read_text() for path in pages)
    data = json.loads(figures.DATA.read_text())
    rows = [row.replace("*", "").split("|") for row in page.splitlines() if row.startswith("|")]
    cells = [{cell.partition("+-")[0].strip() for cell in row} for row in rows]
    for _, accuracy, cost, _ in data["bars"]:
        assert any({f"{cost:.2f}", f"{accuracy}"} <= row for row in cells)
    for kinds in data["cost"].values():
        for cost, accuracy in kinds["all"]:
            assert any({f"{cost:.2f}", f"{accuracy}"} <= row for row in cells)
        for cost, accuracy in kinds.get("margin", []):
            assert f"{cost:.2f}" in page or f"{cost} times" in page
            assert f"{accuracy}" in page
    for name, by_tau in data["many and few"].items():
        for tau, (many, few) in by_tau.items():
            in_table = any({f"{many}", f"{few}"} <= row for row in cells)
            in_text = f"/ {many} / " in page and f"/ {few})" in page
            assert in_table or in_text, f"{name} at {tau}"
