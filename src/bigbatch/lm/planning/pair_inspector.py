"""One pass over documents whose sequences are compared."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.pair_encoding import PairEncoder
from bigbatch.lm.data.tokenization import BATCH_DOCUMENTS, Encoded
from bigbatch.lm.planning.document_inspector import InspectedSample, Inspector, segments_of
from bigbatch.lm.text import SAMPLE_NOUNS, plural

LONG = {
    "dpo": "cut at its end",
    "reward": "left out, with the pair",
    "embedding": "cut at its end",
}


class PairInspector(Inspector):
    """Counts and shows each sequence of a pair, or of a query with its passages."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._names: dict[int, tuple[str, ...]] = {}

    def _encoded(self, documents: Iterator[Document]) -> Iterator[Encoded]:
        encoder = PairEncoder(self._tokenizer, self._config.objective)
        first = 0
        while batch := list(islice(documents, BATCH_DOCUMENTS)):
            for index, document in enumerate(batch, first):
                self._names[index] = tuple(part.name for part in document.parts or ())
            yield from encoder.encode(batch, self.found.broken, first=first)
            first += len(batch)

    def _is_long(self, encoded: Encoded) -> bool:
        return len(encoded.tokens) > self._max_length

    def samples(self) -> tuple[InspectedSample, ...]:
        """Return the samples to show, a sequence after the other."""
        return tuple(
            InspectedSample(
                f"{source}, {name}", len(part.tokens), sum(part.trained), tuple(segments_of(part, self._tokenizer))
            )
            for _, (source, parts) in sorted(self._chosen.items())
            for name, part in zip(self._names[parts[0].document], parts, strict=True)
        )

    def counts(self) -> list[str]:
        """Return lines with the numbers of samples, sequences and tokens."""
        found, noun = self.found, SAMPLE_NOUNS[self._config.objective]
        sequences = sum(parts * number for parts, number in found.sequences.items())
        shapes = ", ".join(f"{number:,} {shape}" for shape, number in found.shapes.most_common())
        return [
            f"{plural(found.shapes.total(), noun)}: {shapes}",
            f"{plural(sequences, 'sequence')} with {plural(found.tokens, 'token')}, {found.trained:,} of them compared",
        ]

    def notes(self) -> list[str]:
        """Return sentences about how the sequences are compared."""
        if not self.found.cut:
            return []
        return [
            f"{plural(self.found.cut, 'sequence')} longer than --max-length {self._max_length}: each will be "
            f"{LONG[self._config.objective]}"
        ]
