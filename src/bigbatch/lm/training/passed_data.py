"""The data of a run whose dataset was passed by Python code, instead of read from the sources of its configuration.

dataset, validation_dataset → records: corpora for `DataLoader` | tokenized samples: their datasets → RunData
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.run_order import UniformOrder
from bigbatch.lm.data.sample_dataset import Rows, SampleDataset, check_rows, corpus_of, has_samples
from bigbatch.lm.data.sampling_order import ORDER_VERSION
from bigbatch.lm.data.sources import DataSources
from bigbatch.lm.data.tokenizer import AnyTokenizer
from bigbatch.lm.data.validation_split import HashSplit
from bigbatch.lm.model.custom_loss import name_of
from bigbatch.lm.training.data import DataLoader, ProgressCallback, RunData, read_options

PASSED_DATA = "<dataset>"
"""The setting ``data`` of a run whose dataset was passed by Python code; no file and no dataset has this name."""

PASSED = "passed"
"""The fact of a run that lists what Python code passed to it besides settings."""

_OF_SOURCES = ("data", "data_weights", "split", "subset", "validation_data")
"""Settings that a dataset replaces."""

DATASET, VALIDATION = "dataset", "validation_dataset"  # the arguments, for messages


@dataclass(frozen=True)
class PassedInputs:
    """What Python code passes to a run besides settings.

    Attributes:
        dataset: Samples or records to train on; None for the sources of the configuration.
        validation: Samples or records to validate on; None for those of the configuration, or a part of the dataset.
        loss_fn: Name of the loss function; None for the cross entropy.
    """

    dataset: Rows | None = None
    validation: Rows | None = None
    loss_fn: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is passed, as run-manifest.json and each checkpoint store it; empty if nothing is."""
        given = {DATASET: self.dataset is not None, VALIDATION: self.validation is not None, "loss_fn": self.loss_fn}
        return {name: value for name, value in given.items() if value}


def check_nothing_passed(folder: Path, facts: Mapping[str, Any] | None) -> None:
    """Check that a run needs nothing that only Python code can pass.

    Args:
        folder: The run directory.
        facts: Those in run-manifest.json.

    Raises:
        InputError: It needs a dataset or a loss function.
    """
    if passed := (facts or {}).get(PASSED):
        raise InputError(
            f"{folder} was started in Python with its own {' and '.join(passed)}: resume it with "
            f"bigbatch.lm.train(resume={str(folder)!r}, ...), passing the same."
        )


def check_inputs(config: TrainConfig, dataset: Any, validation: Any, loss_fn: Any) -> PassedInputs:
    """Check the arguments of `bigbatch.lm.train`.

    Raises:
        InputError: One of them cannot be used, or the configuration has other data.
    """
    if validation is not None and dataset is None:
        raise InputError(f"{VALIDATION} needs a {DATASET}; for files, use the setting validation_data.")
    given = [
        name for name in _OF_SOURCES if name in config.model_fields_set and getattr(config, name) != (PASSED_DATA,)
    ]
    if dataset is not None and given:
        raise InputError(f"{DATASET} and the setting {given[0]} exclude each other: pass one of them.")
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(f"loss_fn is {type(loss_fn).__name__}: pass a function of a model and a micro-batch.")
    return PassedInputs(
        None if dataset is None else check_rows(dataset, DATASET),
        None if validation is None else check_rows(validation, VALIDATION),
        None if loss_fn is None else name_of(loss_fn),
    )


def check_passed(path: Path, facts: Mapping[str, Any] | None, inputs: PassedInputs) -> None:
    """Check that a run is resumed with inputs of the kinds that it was started with.

    Raises:
        InputError: It is not.
    """
    before, now = (facts or {}).get(PASSED) or {}, inputs.facts
    for name in (DATASET, VALIDATION, "loss_fn"):
        if name in before and name not in now:
            raise InputError(f"{path} was started with its own {name}: pass the same {name} to resume it.")
        if name in now and name not in before:
            raise InputError(f"{path} was started without a {name} and cannot be resumed with one. Leave it out.")
        if before.get(name) != now.get(name):
            raise InputError(
                f"{path} was started with the {name} {before[name]} and cannot be resumed with {now[name]}. Pass "
                "the same."
            )


class PassedDataLoader(DataLoader):
    """Makes the datasets of a run from a dataset that was passed.

    Args:
        inputs: With a dataset.
        config: With every default resolved.
        progress: Receives the current activity.
        order_version: Of the sampling order.

    Raises:
        InputError: One dataset has tokens and the other has not.
    """

    def __init__(
        self,
        inputs: PassedInputs,
        config: TrainConfig,
        progress: ProgressCallback,
        *,
        order_version: int = ORDER_VERSION,
    ) -> None:
        assert inputs.dataset is not None, "checked by the caller"
        self._rows, self._validation_rows = inputs.dataset, inputs.validation
        self._with_more = inputs.loss_fn is not None
        self._is_tokenized = has_samples(self._rows)
        if self._validation_rows is not None and has_samples(self._validation_rows) != self._is_tokenized:
            names = (DATASET, VALIDATION) if self._is_tokenized else (VALIDATION, DATASET)
            raise InputError(f"{names[0]} has 'input_ids' and {names[1]} has not: pass samples or records in both.")
        super().__init__(config, progress, order_version=order_version)

    def _open(self, raw: Sequence[str]) -> DataSources:
        if self._is_tokenized:
            return DataSources((), ())
        options, validation = read_options(self._config), self._validation_rows
        corpora = () if validation is None else (corpus_of(validation, VALIDATION, options),)
        return DataSources((corpus_of(self._rows, DATASET, options),), corpora)

    def train_tokenizer(self, vocabulary_size: int) -> AnyTokenizer:
        """Return a tokenizer trained on the records.

        Raises:
            InputError: The dataset has tokens, or a record cannot be read.
        """
        if self._is_tokenized:
            raise InputError(
                f"{DATASET} has 'input_ids', and the tokenizer of this model is trained on text: pass records with "
                "text, or the model whose tokenizer made the tokens."
            )
        return super().train_tokenizer(vocabulary_size)

    def load(self, tokenizer: AnyTokenizer, max_length: int) -> RunData:
        """Return the datasets.

        Raises:
            InputError: A sample or record is invalid.
            BigbatchError: The token cache cannot be written.
        """
        if not self._is_tokenized:
            return super().load(tokenizer, max_length)
        whole = self._samples_of(self._rows, DATASET, tokenizer, max_length)
        fraction = self._config.validation_fraction if self._validation_rows is None else 0.0
        held_out = HashSplit.of([whole.keys], validation_fraction=fraction).held_out(whole.keys)
        training, validation = whole.part(~held_out), None
        if self._validation_rows is not None:
            validation = self._samples_of(self._validation_rows, VALIDATION, tokenizer, max_length)
        elif held_out.any():
            validation = whole.part(held_out)
        notes = [f"training data: {training.counts.describe()}"]
        if validation is not None:
            notes.append(f"validation data: {validation.counts.describe()}")
        elif fraction:
            notes.append("no validation set: the data is too small to split")
        order = UniformOrder(training.lengths, self._config.seed, self._order_version)
        passed = None if self._validation_rows is None or validation is None else validation.fingerprint
        return RunData(training, validation, order, whole.fingerprint, tuple(notes), validation_fingerprint=passed)

    def _samples_of(self, rows: Rows, name: str, tokenizer: AnyTokenizer, max_length: int) -> SampleDataset:
        self._progress(f"reading {name}", 0, len(rows))
        return SampleDataset(
            rows,
            name,
            max_length=max_length,
            num_tokens=len(tokenizer),
            with_more=self._with_more,
            progress=lambda done: self._progress(f"reading {name}", done, len(rows)),
        )
