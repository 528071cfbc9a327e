"""Every test streams chunks of a few parameters."""

from collections.abc import Iterator

import pytest

from offload.models import small_chunks


@pytest.fixture(autouse=True)
def chunks_are_small() -> Iterator[None]:
    with small_chunks():
        yield
