"""The interface of shards of tokens: their records in order, and any record from its bytes.

shards → RawRecord (shard, offset, bytes) → decode → record → Document of tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.reading import Reading
from bigbatch.lm.data.token_records import to_token_document
from bigbatch.lm.data.token_shards.storage import Storage, StoredFile


@dataclass(frozen=True)
class RawRecord:
    """A record in its shard.

    Attributes:
        shard: Index of the shard.
        offset: Of its first byte in the shard.
        data: Its bytes.
        source: Names it in messages.
    """

    shard: int
    offset: int
    data: bytes
    source: str


class TokenShards(Protocol):
    """Shards of records with tokens."""

    @property
    def name(self) -> str:
        """The source, as the user named it."""

    @property
    def kind(self) -> str:
        """The format, in words."""

    @property
    def storage(self) -> Storage:
        """Where the shards are."""

    @property
    def shards(self) -> tuple[StoredFile, ...]:
        """The files, in order."""

    @property
    def is_in_place(self) -> bool:
        """Whether a record can be read from its bytes alone: the shards are not compressed."""

    def raw(self, reading: Reading) -> Iterator[RawRecord]:
        """Yield the records in order.

        Raises:
            InputError: A shard cannot be read, and broken files are not skipped.
        """

    def decode(self, shard: int, data: bytes, source: str) -> Mapping[str, Any]:
        """Return a record.

        Raises:
            InputError: It is damaged.
        """


def located_documents(shards: TokenShards, reading: Reading) -> Iterator[tuple[RawRecord, Document]]:
    """Yield each record with the document that it makes; a broken one is skipped and counted, or raised.

    Raises:
        InputError: A shard or a record cannot be read, and broken input is not skipped.
    """
    for raw in shards.raw(reading):
        try:
            document = to_token_document(shards.decode(raw.shard, raw.data, raw.source), raw.source)
        except InputError as error:
            reading.skip_record(error)
        else:
            yield raw, document


def state_of(shards: TokenShards) -> list[Any]:
    """Return a JSON value that changes when the content of the shards does: path, size and version of each file."""
    return [shards.kind, [[file.path, file.size, file.state] for file in shards.shards]]
