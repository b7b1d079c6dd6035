"""What the package offers is what `tests/public_names.txt` says."""

import difflib

import ride_plugin
from tests.public_names import SNAPSHOT, lines, names_of


def test_public_names_and_signatures_are_those_of_the_snapshot() -> None:
    changes = difflib.unified_diff(
        SNAPSHOT.read_text().splitlines(), list(lines()), "snapshot", "package", lineterm="", n=0
    )
    assert list(changes) == [], "if this is meant, run `python -m tests.public_names` and commit"


def test_the_top_offers_a_face_and_not_the_whole_house() -> None:
    assert len(names_of(ride_plugin)) <= 35
