"""A list of JSON values is read in parts of any size as it is read at once, and a part of it is never taken for all."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch.errors import InputError
from bigbatch.lm.data import json_files
from bigbatch.lm.data.reading import Reading

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=9
)


def read(data: bytes, chunk: int) -> list[object]:
    @contextmanager
    def opened() -> Iterator[BinaryIO]:
        yield io.BytesIO(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK_BYTES", chunk)
        return [value for value, _ in json_files.read_json(opened, "a.json", Reading(), lambda _: True)]


@given(st.lists(VALUES, max_size=4), st.sampled_from([1, 2, 3, 7, 64]), st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=150, deadline=None)
def test_parts_of_any_size_give_same_values(
    values: list[Any], chunk: int, ascii_only: bool, indent: int | None
) -> None:
    assert read(json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode(), chunk) == values


@given(st.lists(VALUES, min_size=1, max_size=4), st.sampled_from([1, 5, 64]), st.data())
@settings(max_examples=100, deadline=None)
def test_cut_list_is_an_error(values: list[Any], chunk: int, draw: st.DataObject) -> None:
    whole = json.dumps(values).encode()
    with pytest.raises(InputError, match=r"^a\.json.*(JSON|UTF-8)"):
        read(whole[: draw.draw(st.integers(1, len(whole) - 1))], chunk)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_number_is_read_whole(chunk: int) -> None:
    assert read(b"[1.5e3, -7, 12345]", chunk) == [1500.0, -7, 12345]
