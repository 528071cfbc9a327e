"""The files of a token store, and its manifest.

    STORE/manifest.json        what the store holds; written last
    STORE/tokens-00000.arrow   one row for each token of the first shard
    STORE/documents-00000.arrow   one row for each encoded document of the first shard

Both are Arrow IPC files without compression. Columns of ``tokens-*``: ``token`` (int32), ``trained`` (bool: the token
is trained on as a target) and, only in a shard with ``has_weights``, ``weight`` (float32: of its loss). Every record
batch has `BATCH_TOKENS` rows, the last one of a shard the rest. Columns of ``documents-*``, in record batches of
`BATCH_ROWS`: ``tokens`` (int64: how many of the shard's tokens, in order), ``key`` (uint64: the first 64 bits of the
SHA-256 of the document's content) and ``part`` (int32: a document that is trained in several parts has one row for
each of them, numbered from 0, with the same key). A document is never cut between two shards.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError, os_reason
from bigbatch.lm.files import read_json
from bigbatch.lm.text import plural

MANIFEST = "manifest.json"
FORMAT = "bigbatch tokens"
VERSION = 1
BATCH_TOKENS = 1 << 20  # rows of a record batch
BATCH_ROWS = 1 << 16  # rows of a record batch of documents
SHARD_TOKENS = 1 << 27  # a shard ends with the first document after so many tokens: 0.5 GiB


@dataclass(frozen=True)
class Shard:
    """Two files of a store.

    Attributes:
        tokens: Rows of its tokens.
        rows: Encoded documents.
        token_bytes: Size of its file of tokens.
        row_bytes: Size of its file of documents.
        has_weights: Whether its tokens have weights other than 0 and 1.
        sha256: Of the SHA-256 of its tokens, marks and weights, by record batch, and of that of its documents.
    """

    tokens: int
    rows: int
    token_bytes: int
    row_bytes: int
    has_weights: bool
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a token store holds.

    Attributes:
        shards: In order.
        documents: Documents encoded.
        tokenizer: Fingerprint of the tokenizer and its chat template.
        model: Where the tokenizer came from, for messages.
        notes: About the data: one line for each count of documents read or left out.
        left_out: Those of the notes that say what was left out.
        is_single_text: Whether the data was one text. It has no shards then: how it is cut in two for validation
            depends on the run.
        part: Number of this part, from 0, and how many there are, of a store that several processes made.
        description: What it was made from, for messages.
    """

    shards: tuple[Shard, ...]
    documents: int
    tokenizer: str
    model: str
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    is_single_text: bool = False
    part: tuple[int, int] = (0, 1)
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the tokens, marks, weights, and bounds and keys of documents."""
        return sha256(json.dumps([shard.sha256 for shard in self.shards]).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.token_bytes + shard.row_bytes for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        content = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        return json.dumps({**content, "digest": _digest(content)}, indent=1).encode() + b"\n"


def token_file(shard: int) -> str:
    """Return the name of a shard's file of tokens."""
    return f"tokens-{shard:05d}.arrow"


def document_file(shard: int) -> str:
    """Return the name of a shard's file of documents."""
    return f"documents-{shard:05d}.arrow"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store, and compare the sizes of its files.

    Raises:
        InputError: The store is incomplete, was changed, or has another version.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path)
        digest, version = content.pop("digest"), content.pop("version")
        if content.pop("format") != FORMAT or version != VERSION:
            raise InputError(
                f"{folder} holds tokens in version {version!r} of its format, and this bigbatch reads version "
                f"{VERSION}. Tokenize the data again."
            )
        if digest != _digest({"format": FORMAT, "version": version, **content}):
            raise _damaged(folder, f"{MANIFEST} was changed")
        del content["fingerprint"]
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        for name in ("notes", "left_out", "part"):
            content[name] = tuple(content[name])
        manifest = Manifest(shards=shards, **content)
        for i, shard in enumerate(shards):
            for name, num_bytes in ((token_file(i), shard.token_bytes), (document_file(i), shard.row_bytes)):
                if (found := (folder / name).stat().st_size) != num_bytes:
                    raise _damaged(folder, f"{name} has {plural(found, 'byte')} and had {num_bytes:,}")
    except OSError as error:
        raise _damaged(folder, f"{error.filename or path} cannot be read ({os_reason(error)})") from error
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST} is not what bigbatch writes") from error
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(folder: Path, why: str) -> InputError:
    return InputError(f"the tokens in {folder} are damaged: {why}. Delete the folder and tokenize the data again.")
