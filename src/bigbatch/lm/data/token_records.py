"""Records of tokens that another tool encoded: their columns, and the document that they make.

    input_ids or tokens      whole numbers: the tokens
    labels                   the token itself where it is trained on, −100 where it is not; not shifted
    completion_mask,         1 where a token is trained on, else 0
    assistant_masks
    attention_mask           0 for the padding at either end, which is removed

Without labels and masks, every token but the first is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bigbatch.errors import InputError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.messages import NO_TOKEN

if TYPE_CHECKING:  # numpy is imported where tokens are read: reading text does without
    import numpy as np
    from numpy.typing import NDArray

TOKENS = "tokens"
"""Other name of ``input_ids``, if it is a list of numbers: columns of that name may hold other things."""
LABELS = "labels"
PADDING = "attention_mask"
MASKS = ("completion_mask", "assistant_masks", PADDING)
NOT_TRAINED = -100
TOKEN_BYTES = 4  # of a token in a document


def has_token_list(record: Mapping[Any, Any]) -> bool:
    """Return whether a record has tokens under the name ``tokens``."""
    value = record.get(TOKENS)
    if isinstance(value, bytes) or hasattr(value, "dtype"):
        return True
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value[:8])


def to_token_document(record: Mapping[Any, Any], source: str) -> Document:
    """Convert a record of tokens to a document.

    Args:
        record: A mapping with ``input_ids`` or ``tokens``: lists of whole numbers, arrays, or bytes of int64.
        source: Names it in messages.

    Raises:
        InputError: A column has another structure, or there is no token to train on.
    """
    import numpy as np

    name = "input_ids" if record.get("input_ids") is not None else TOKENS
    if record.get(name) is None:
        raise InputError(f"{source}: the record has no tokens: neither 'input_ids' nor 'tokens'.")
    tokens = _numbers(record[name], name, source)
    others = {
        column: _numbers(record[column], column, source)
        for column in (LABELS, *MASKS)
        if record.get(column) is not None
    }
    for column, values in others.items():
        if len(values) != len(tokens):
            raise InputError(f"{source}: {column!r} has {len(values):,} entries, and {name!r} has {len(tokens):,}.")
    for column in others.keys() & set(MASKS):
        if not np.isin(others[column], (0, 1)).all():
            raise InputError(f"{source}: {column!r} has entries other than 0 and 1.")
    inside = _inside(others.pop(PADDING, None), len(tokens), source)
    tokens = tokens[inside]
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise InputError(f"{source}: {name!r} has {_outside(tokens)}, which is no token.")
    trained = np.ones(len(tokens), np.bool_)
    for column, found in others.items():
        values = found[inside]
        if column == LABELS:
            _check_labels(values, tokens, source)
            trained &= values != NOT_TRAINED
        else:
            trained &= values == 1
    if not trained[1:].any():
        why = "it has fewer than 2 tokens" if len(tokens) < 2 else "all of its tokens are masked"
        raise InputError(f"{source}: the record {NO_TOKEN}: {why}.")
    trained[0] = False
    marks = None if trained[1:].all() else trained.tobytes()
    return Document(source, tokens=tokens.astype("<i4").tobytes(), trained=marks, shape="tokens")


def token_ids(document: Document) -> NDArray[np.int32]:
    """Return the tokens of a document of tokens."""
    import numpy as np

    assert document.tokens is not None, "a document of tokens"
    return np.frombuffer(document.tokens, "<i4")


def all_but_first(document: Document) -> bytes:
    """Return the marks of a document of tokens whose tokens are all trained on, but the first."""
    return b"\0" + b"\1" * (document.size // TOKEN_BYTES - 1)


def foreign_token(largest: int, source: str, vocabulary: int) -> str | None:
    """Return a sentence if the largest token of a source is not one of a tokenizer with ``vocabulary`` tokens."""
    if largest < vocabulary:
        return None
    return (
        f"{source} has the token {largest:,}, and the tokenizer of the model has {vocabulary:,} tokens. Pass the "
        "--model whose tokenizer made the tokens."
    )


def _numbers(value: Any, name: str, source: str) -> NDArray[Any]:
    """Return a column as a vector of whole numbers."""
    import numpy as np

    if isinstance(value, bytes):
        if len(value) % 8:
            raise InputError(f"{source}: {name!r} has {len(value):,} bytes, and bytes are read as int64.")
        return np.frombuffer(value, "<i8")
    try:
        found = np.asarray(value)
    except ValueError:  # lists of different lengths
        found = np.zeros((0, 0))
    if found.ndim == 1 and not found.size:
        return np.zeros(0, np.int64)
    kinds = "iub" if name in MASKS else "iu"
    if found.ndim != 1 or found.dtype.kind not in kinds:
        raise InputError(f"{source}: {name!r} must be a list of whole numbers.")
    return found.astype(np.int64)


def _inside(mask: NDArray[Any] | None, number: int, source: str) -> slice:
    """Return the place of the tokens that are no padding."""
    import numpy as np

    if mask is None or not number:
        return slice(0, number)
    places = np.flatnonzero(mask)
    if not len(places):
        raise InputError(f"{source}: the record {NO_TOKEN}: its 'attention_mask' is 0 throughout.")
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != len(places):
        raise InputError(f"{source}: 'attention_mask' has a 0 between two tokens, and only padding may have one.")
    return slice(first, last + 1)


def _check_labels(labels: NDArray[Any], tokens: NDArray[Any], source: str) -> None:
    import numpy as np

    wrong = np.flatnonzero((labels != NOT_TRAINED) & (labels != tokens))
    if len(wrong):
        place = int(wrong[0])
        raise InputError(
            f"{source}: 'labels' has {labels[place]} where the token is {tokens[place]}. A label must be the token "
            "itself, not the next one, or -100 where it is not trained on."
        )


def _outside(tokens: NDArray[Any]) -> int:
    return int(tokens.min() if tokens.min() < 0 else tokens.max())
