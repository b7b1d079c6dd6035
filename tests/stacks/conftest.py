from collections.abc import Iterator

import pytest

from benchmarks.coverage.environment import let_torchvision_import
from tests.distributed.ranks import Ranks

let_torchvision_import()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    both = Ranks()
    yield both
    both.stop()
