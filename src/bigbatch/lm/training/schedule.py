"""Training schedule: the samples of every window and the learning rate of every update, fixed before the first.

order of the data, global batch or its schedule → windows → number of updates → learning rate of each
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigbatch.errors import InputError
from bigbatch.lm.config.batch_schedule import Schedule, Seesaw, read
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.run_order import RunOrder, UniformOrder
from bigbatch.lm.data.sampling_order import num_tokens_of, window_bounds
from bigbatch.lm.text import plural
from bigbatch.lm.training.optimizer import lr_factor


class TrainingSchedule:
    """The windows of a run and their learning rates; the same on every rank and after every resume.

    Args:
        config: With every default resolved.
        lengths: Tokens of every sample.
        order: Of the samples; by default every sample once in each epoch.
        step: Updates before this process, with any batch.
        cursor: Samples of these updates.

    Attributes:
        total_steps: Updates of the whole run.
        warmup_steps: Warm-up updates, a part of ``total_steps``.

    Raises:
        InputError: The warm-up is longer than the run, or the batch schedule is incompatible with --schedule.
    """

    def __init__(
        self,
        config: TrainConfig,
        lengths: Sequence[int] | NDArray[np.integer[Any]],
        *,
        order: RunOrder | None = None,
        step: int = 0,
        cursor: int = 0,
    ) -> None:
        self._config = config
        self._lengths = np.asarray(lengths)
        self._order = UniformOrder(self._lengths, config.seed) if order is None else order
        self._step, self._cursor = step, cursor
        text = config.global_batch_schedule
        self.schedule: Schedule | None = None if text is None else read(text)
        self._tokens_at = 0, 0, 0  # epoch, position in it, and the tokens of the epoch before that position
        self._base_steps = config.steps or self._count_steps(config.epochs or 0)
        self.warmup_steps = config.warmup_steps_of(self._base_steps)
        if isinstance(self.schedule, Seesaw):
            if config.schedule == "constant":
                raise InputError(
                    f'--global-batch-schedule "{text}" grows the batch instead of lowering the learning rate, which '
                    "--schedule constant never lowers. Pass --schedule cosine."
                )
            if not config.final_lr_factor():
                raise InputError(
                    f'--global-batch-schedule "{text}" grows the batch wherever the learning rate would halve, and '
                    f"--schedule {config.schedule} lowers it to 0. Pass a --min-lr above 0."
                )
            self.total_steps = len(self._samples_before)
        else:
            self.total_steps = self._base_steps
        if self.warmup_steps > self.total_steps:
            raise InputError(
                f"--warmup-steps {self.warmup_steps:,} is more than the {plural(self.total_steps, 'update')} of the "
                "run: the learning rate would never reach its peak."
            )
        decay_steps = config.decay_steps_of(self.total_steps)
        if config.schedule == "wsd" and self.warmup_steps + decay_steps > self.total_steps:
            raise InputError(
                f"--warmup-steps {self.warmup_steps:,} and --decay-steps {decay_steps:,} are more than the "
                f"{plural(self.total_steps, 'update')} of the run together. Lower one of them."
            )

    def windows(self, step: int, cursor: int) -> Iterator[list[int]]:
        """Yield the windows that remain after ``step`` updates and ``cursor`` samples."""
        epoch, position = self._order.locate(cursor)
        while True:
            for start, stop in self._bounds(epoch, position):
                if step == self.total_steps:
                    return
                step += 1
                yield self._order.epoch(epoch).part(start, stop).tolist()
            epoch, position = epoch + 1, 0

    def first_window(self) -> list[int]:
        """Return the samples of the first update."""
        start, stop = next(self._bounds(0))
        return self._order.epoch(0).part(start, stop).tolist()  # type: ignore[no-any-return]

    def first_samples(self, number: int, *, cursor: int = 0) -> list[int]:
        """Return at most ``number`` samples in the order of training, after ``cursor`` samples."""
        epoch, position = self._order.locate(cursor)
        samples: list[int] = []
        while len(samples) < number:
            samples += self._order.epoch(epoch).part(position, position + number - len(samples)).tolist()
            epoch, position = epoch + 1, 0
        return samples

    def updates_per_epoch(self) -> int:
        """Return the number of updates of the first epoch."""
        return sum(1 for _ in self._bounds(0))

    def batch_after(self, cursor: int) -> int | None:
        """Return the sequences of the window after ``cursor`` samples; None if the batch is counted in tokens."""
        if self.schedule is None:
            return self._config.global_batch
        return self._batch_at(self._tokens_before(*self._order.locate(cursor)), cursor)

    def lr_factor(self, step: int) -> float:
        """Return the learning rate of an update, as a fraction of the peak."""
        if isinstance(self.schedule, Seesaw) and step >= self.warmup_steps:
            return self.schedule.factor(self._plain_factor(self._samples_before[min(step, self.total_steps - 1)]))
        return self._factor(step, self.total_steps)

    def _factor(self, step: float, total_steps: int) -> float:
        return lr_factor(
            step,
            total_steps=total_steps,
            warmup_steps=self.warmup_steps,
            schedule=self._config.schedule,
            final=self._config.final_lr_factor(),
            decay_steps=self._config.decay_steps_of(total_steps),
        )

    def _plain_factor(self, samples: int) -> float:
        """Return the fraction of the peak after ``samples`` samples, if the batch were the first one throughout."""
        step = samples / self._first_batch
        if step < self.warmup_steps:
            return 1.0
        return self._factor(step, self._base_steps)

    @property
    def _first_batch(self) -> int:
        assert self._config.global_batch is not None, "a schedule is in sequences"
        return self._config.global_batch

    @cached_property
    def _samples_before(self) -> list[int]:
        """Samples before each update of a run with as many samples in all as with the first batch throughout."""
        befores, samples, wanted = [], 0, self._base_steps * self._first_batch
        epoch = 0
        while samples < wanted:
            for start, stop in self._bounds(epoch):
                if samples >= wanted:
                    break
                befores.append(samples)
                samples += stop - start
            epoch += 1
        return befores

    def _count_steps(self, epochs: int) -> int:
        """Return the updates of ``epochs`` epochs: those done, with any batch, and those that remain.

        Under `Seesaw`, the number with the first batch throughout, independent of progress.
        """
        in_one_batch = self.schedule is None and self._config.global_batch is not None and not self._step
        if in_one_batch or isinstance(self.schedule, Seesaw):
            samples = (self._order.samples_before(i + 1) - self._order.samples_before(i) for i in range(epochs))
            return sum(-(-number // self._first_batch) for number in samples)
        first, position = self._order.locate(self._cursor)
        remaining = (self._bounds(epoch, position * (epoch == first)) for epoch in range(first, epochs))
        return self._step + sum(sum(1 for _ in bounds) for bounds in remaining)  # windows of tokens depend on the order

    def _batch_at(self, tokens: int, samples: int) -> int:
        if isinstance(self.schedule, Seesaw):
            return self.schedule.batch(self._first_batch, self._plain_factor(samples))
        assert self.schedule is not None, "called only with a schedule"
        return self.schedule.batch_at(tokens)

    def _bounds(self, epoch: int, position: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) in the order of an epoch of each of its windows from a position on."""
        order = self._order.epoch(epoch)
        if self.schedule is None:
            yield from window_bounds(
                order,
                self._lengths,
                global_batch=self._config.global_batch,
                global_batch_tokens=self._config.global_batch_tokens,
                position=position,
            )
            return
        before = self._order.samples_before(epoch)
        while position < len(order):
            size = self._batch_at(self._tokens_before(epoch, position), before + position)
            yield position, min(position + size, len(order))
            position += size

    def _tokens_before(self, epoch: int, position: int) -> int:
        """Return the tokens of the run before a position; later positions of an epoch continue from the latest one."""
        known_epoch, known, tokens = self._tokens_at
        if known_epoch != epoch or known > position:
            known, tokens = 0, 0
        tokens += num_tokens_of(self._order.epoch(epoch), self._lengths, known, position)
        self._tokens_at = epoch, position, tokens
        return self._order.tokens_before(epoch) + tokens
