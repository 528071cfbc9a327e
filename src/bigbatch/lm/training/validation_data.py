"""The validation sets of a run: tokens of ``--validation-data`` or of validation splits → datasets by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.validation_sets import UNNAMED, primary_set, read_sets
from bigbatch.lm.data.dataset import TokenDataset
from bigbatch.lm.data.token_store.reader import TokenReader
from bigbatch.lm.data.token_store.samples import Samples
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.runs.identity import digest_of
from bigbatch.lm.training.token_sources import TokenSource, joined


@dataclass(frozen=True)
class ValidationData:
    """The validation sets of a run.

    Attributes:
        sets: By name; the only one may be `UNNAMED`. Empty if there is too little data to hold any out.
        primary: The set whose loss is ``validation_loss``: that of ``best_metric``, else the first; None without sets.
        notes: A sentence for each set.
        fingerprint: SHA-256 of the tokens of the sets, in hex; None if they are held out of the training data.
    """

    sets: Mapping[str, TokenDataset]
    primary: TokenDataset | None
    notes: tuple[str, ...]
    fingerprint: str | None = None

    @property
    def named(self) -> Mapping[str, TokenDataset]:
        """The sets that have names."""
        return {} if UNNAMED in self.sets else self.sets


def read_validation_data(
    config: TrainConfig,
    sources: Sequence[TokenSource],
    held_out: tuple[TokenReader, Samples],
    make_samples: Callable[..., tuple[list[Samples], list[list[int]], str]],
    max_length: int,
) -> ValidationData:
    """Return the sets of the sources, or without any, what is held out of the training data.

    Args:
        config: Of the run.
        sources: Of ``validation_data`` in its order, or of validation splits.
        held_out: Tokens of the training data, and the samples that are held out, perhaps none.
        make_samples: Returns the samples of both sides of a split of sources, first.
        max_length: Tokens of the longest sample.

    Raises:
        InputError: A set has no sequence, or ``best_metric`` names none.
    """
    found = {UNNAMED: held_out} if len(held_out[1].starts) else {}
    fingerprints: list[list[str]] = []
    if sources:
        found = {}
        remaining = list(sources)
        names = read_sets(config.validation_data or ()) or {UNNAMED: tuple("" for _ in sources)}
        for name, texts in names.items():
            of_set, remaining = remaining[: len(texts)], remaining[len(texts) :]
            (samples, _), _, _ = make_samples([joined(of_set)], max_length, HashSplit())
            found[name] = joined(of_set).reader, samples
            fingerprints.append([name, *joined(of_set).fingerprints])
            if not len(samples.starts):
                flag = (
                    f"--validation-data {name and f'{name}='}{' '.join(texts)}" if texts[0] else "the validation data"
                )
                raise InputError(f"{flag} has no sequence to validate on. Pass other data.")
    sets = {name: TokenDataset(*part) for name, part in found.items()}
    notes = [
        f"validation data{name and f' {name}'}: {samples.counts.describe()}" for name, (_, samples) in found.items()
    ]
    if not sets and config.validation_fraction:
        notes.append("no validation set: the data is too small to split")
    primary = sets[primary_set(sets, config.best_metric)] if sets else None
    return ValidationData(sets, primary, tuple(notes), digest_of({"sets": fingerprints}) if sources else None)
