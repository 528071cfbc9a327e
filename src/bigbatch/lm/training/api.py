"""`bigbatch.lm.train`: the trainer as a function, with a dataset, a loss and callbacks of the caller.

config → TrainConfig → new or resumed: set-up → Trainer → run directory → RunResult
"""

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigbatch.errors import BigbatchError, InputError, RankFailedError
from bigbatch.lm.checkpoint.run_checkpoint import RunCheckpoint, load
from bigbatch.lm.config.settings_file import to_config
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.sample_dataset import collate_more
from bigbatch.lm.data.sampling_order import ORDER_VERSION, sampling_order_of
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.files import open_regular
from bigbatch.lm.model.custom_loss import CustomLoss
from bigbatch.lm.model.start import widen_for_loss
from bigbatch.lm.runs.directory import ReadOnlyRunDirectory, RunDirectory, check_free, default_path
from bigbatch.lm.runs.file_names import METRICS
from bigbatch.lm.runs.identity import read_identity
from bigbatch.lm.runs.lock import RunLock
from bigbatch.lm.training.best_checkpoint import stops_early
from bigbatch.lm.training.callbacks import MetricsRow, TrainResult
from bigbatch.lm.training.dashboards import check_log, with_dashboards
from bigbatch.lm.training.data import DataLoader
from bigbatch.lm.training.event_log import EventLog
from bigbatch.lm.training.library_output import silent_libraries
from bigbatch.lm.training.passed_data import (
    DATASET,
    PASSED_DATA,
    PassedDataLoader,
    PassedInputs,
    check_inputs,
    check_passed,
)
from bigbatch.lm.training.resume import check_facts, merge_config, stored_config, with_saved_changes
from bigbatch.lm.training.setup import TrainingSetup, set_up_training, with_fp8_gradient
from bigbatch.lm.training.trainer import Trainer
from bigbatch.lm.training.user_callbacks import RunResult, RunStart, UserCallbacks


@silent_libraries()
def train(
    config: TrainConfig | Mapping[str, object] | str | Path | None = None,
    dataset: Any = None,
    *,
    validation_dataset: Any = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    callbacks: Iterable[Any] = (),
    resume: str | Path | None = None,
) -> RunResult:
    """Train a language model as ``bigbatch train`` does, and return the result.

        result = bigbatch.lm.train({"model": "base", "epochs": 1}, dataset, callbacks=[Log()])

    Writes the same run directory, with the same checkpoints. Nothing is printed and no signal is handled; sentences
    for the user are in ``result.notes``. The progress bars and warnings of transformers are off until it returns, also
    in callbacks. Every update is that of the whole global batch, for any micro-batch.

    With an initialized process group of torch.distributed, every rank calls this function with the same arguments, and
    its device is the current one; it is collective then. Callbacks are called on the first rank.

    Args:
        config: A `TrainConfig`, a dict of its fields, or the path of a TOML or YAML file with them; None for the
            defaults. In a resumed run, settings that differ from those of the run, as for ``bigbatch resume``.
        dataset: Instead of the setting ``data``: a sequence, such as a list, a map-style torch dataset or a
            ``datasets.Dataset``, of records in the shapes of data files, such as ``{"messages": [...]}``; or of
            tokenized samples ``{"input_ids": [...]}``, whose tokens are all trained on. A sample may have ``labels``
            with one entry for each token, -100 for those that are not trained on, and ``weights``, the weight of the
            loss of each; they are not shifted, bigbatch does that. With a ``loss_fn``, samples may have further
            numbers, or arrays with one number for each token. Rows are read at the start, and again when they are used:
            each must be the same then.
        validation_dataset: Of the same kind, to validate on. By default the setting ``validation_fraction`` holds out
            a part of ``dataset``.
        loss_fn: ``loss_fn(model, microbatch) → (loss_sum, count)``, as for `bigbatch.Engine`, instead of the cross
            entropy: the 0-d sum of the losses of the micro-batch, and the number that it is divided by once the sums of
            the whole batch are added up. ``microbatch`` has ``input_ids``, ``attention_mask`` and ``labels``, int64
            ``[samples, longest]``, with ``labels[i, j]`` the token after ``input_ids[i, j]``, and the further columns
            of the samples: numbers ``[samples]``, arrays shifted like the labels and padded with 0. It is called under
            the autocast of the setting ``precision``, also for validation.
        callbacks: Objects with some of the methods of `bigbatch.lm.Callback`.
        resume: The directory of a run, which is resumed from its newest checkpoint; with the same ``dataset``,
            ``validation_dataset`` and ``loss_fn``, if it was started with them. On the CPU the result is then identical
            to that of an uninterrupted run, bit for bit.

    Returns:
        The result; of a resumed run that was finished already, without training.

    Raises:
        InputError: A setting, a dataset or a callback cannot be used, or a resumed run was started with others. The
            message is one sentence that says what to change.
        BigbatchError: Training failed, or a file cannot be written.
        RankFailedError: A callback failed on the first rank, which raises the exception itself.
    """
    asked = to_config(config)
    inputs = check_inputs(asked, dataset, validation_dataset, loss_fn)
    user = UserCallbacks(callbacks)
    if resume is not None:
        return _resume(Path(resume), asked, inputs, loss_fn, user)
    if inputs.dataset is not None:
        asked = asked.model_copy(update={"data": (PASSED_DATA,)})
    ranks = _ranks(asked)
    asked = _with_own_device(asked, ranks)
    names = (DATASET,) if inputs.dataset is not None else asked.data
    path = Path(ranks.broadcast(str(asked.out or default_path(asked.model, names))))
    with ranks.raise_together():
        check_log(asked.log)
        if ranks.is_first:
            check_free(path)
    with ranks.raise_together():
        setup = with_fp8_gradient(_set_up(asked.model_copy(update={"out": path}), inputs, loss_fn, ranks))
    with ranks.raise_together():
        trainer = Trainer(setup, ranks=ranks)
        trainer.tune(cache=path)
    directory: RunDirectory = ReadOnlyRunDirectory(path)
    with ExitStack() as stack:
        with ranks.raise_together():
            if ranks.is_first:
                settings = setup.config.model_dump(mode="json")
                directory = RunDirectory.create(path, settings, trainer.initial_facts)
                stack.enter_context(RunLock(path))
        return _run(trainer, directory, user, asked)


def _resume(
    path: Path, asked: TrainConfig, inputs: PassedInputs, loss_fn: Callable[[Any, Any], Any] | None, user: UserCallbacks
) -> RunResult:
    with ExitStack() as stack:
        stored = stored_config(path, from_python=True)
        ranks = _ranks(asked if "parallel" in asked.model_fields_set else stored)
        with ranks.raise_together():
            if ranks.is_first:
                stack.enter_context(RunLock(path))
        checkpoint, rejected = load(path, ranks)
        ranks.check_equal({"the newest checkpoints": None if checkpoint is None else checkpoint.path.name})
        facts = read_identity(path).facts if checkpoint is None else checkpoint.facts
        check_passed(path, facts, inputs)
        stored = with_saved_changes(stored, None if checkpoint is None else checkpoint.facts)
        config = _with_own_device(merge_config(stored, asked, allowed=()), ranks)
        check_log(config.log)
        notes = tuple(f"skipped checkpoint {folder}: {reason}" for folder, reason in rejected)
        directory = RunDirectory(path) if ranks.is_first else ReadOnlyRunDirectory(path)
        if checkpoint is not None and directory.has_model and _has_ended(checkpoint, config):
            done = checkpoint.progress
            outcome = TrainResult(
                done.step,
                done.skipped,
                True,
                done.validation_loss,
                0.0,
                stopped_early=done.step < checkpoint.total_steps,
                saved_step=done.best_step if stored.resolved_keep == "best" and done.best_step else done.step,
                best_step=done.best_step,
                best_loss=done.best_loss,
            )
            return _result(outcome, directory, config, notes)
        order_version = sampling_order_of(path, facts, has_checkpoint=checkpoint is not None)
        with ranks.raise_together():
            setup = _set_up(config, inputs, loss_fn, ranks, order_version)
            if facts is not None and inputs.dataset is not None and setup.data_fingerprint != facts["data_sha256"]:
                raise InputError(
                    f"{DATASET} differs from the one that {path} was started with: it has {len(setup.training):,} "
                    f"sequences to train on and had {facts['num_samples']:,}, or their content differs. Pass the same."
                )
        setup = replace(setup, notes=(*notes, *setup.notes))
        with ranks.raise_together():
            trainer = Trainer(setup, checkpoint=checkpoint, ranks=ranks)
            if checkpoint is not None:
                checkpoint.check_model(trainer.engine)
            if facts is not None:
                check_facts(config, facts, trainer.initial_facts, allowed=())
            trainer.tune(cache=path)
        return _run(trainer, directory, user, config)


def _has_ended(checkpoint: RunCheckpoint, config: TrainConfig) -> bool:
    now = checkpoint.progress
    return now.step >= checkpoint.total_steps or stops_early(now, config)


def _run(trainer: Trainer, directory: RunDirectory, user: UserCallbacks, config: TrainConfig) -> RunResult:
    """Run a trainer to its end or until a callback raises. Collective."""
    setup, ranks = trainer.setup, trainer.ranks
    done = 0 if trainer.checkpoint is None else trainer.checkpoint.progress.step
    user = user if ranks.is_first else UserCallbacks(())
    notes = list(setup.notes)
    user.call(
        "on_start",
        RunStart(directory.path, setup.config, setup.model, setup.tokenizer, done, trainer.total_steps, setup.notes),
    )
    _raise_error(user, ranks)

    def receive_note(sentence: str) -> None:
        notes.append(sentence)
        user.call("on_note", sentence)

    log = config.log if ranks.is_first else ()
    settings = config.model_dump(mode="json")
    with (
        EventLog(trainer, directory.path) if ranks.is_first else nullcontext() as event_log,
        with_dashboards(
            user, log, directory.path, done=done, settings=settings, has_perplexity=setup.has_perplexity
        ) as callback,
    ):
        outcome = trainer.run(directory, callback=callback, should_stop=lambda: user.is_stopping, on_note=receive_note)
        if event_log is not None:
            event_log.log_end(outcome, signal=user.stopped_by)
    _raise_error(user, ranks)
    result = _result(outcome, directory, setup.config, tuple(notes))
    user.call("on_end", result)
    _raise_error(user, ranks)
    return result


def _raise_error(user: UserCallbacks, ranks: RankContext) -> None:
    """Raise the exception of a callback on the first rank, and `RankFailedError` on the others. Collective."""
    failure = ranks.broadcast(None if user.error is None else user.stopped_by)
    user.raise_error()
    if failure is not None:
        raise RankFailedError(f"a callback failed on the first rank ({failure}); the run was saved.")


def _result(outcome: TrainResult, directory: RunDirectory, config: TrainConfig, notes: tuple[str, ...]) -> RunResult:
    model_path = directory.adapter if config.saves_adapters else directory.model
    metrics = _read_metrics(directory.path / METRICS)
    return RunResult(**vars(outcome), path=directory.path, model_path=model_path, metrics=metrics, notes=notes)


def _read_metrics(path: Path) -> tuple[MetricsRow, ...]:
    try:
        with open_regular(path) as file:
            return tuple(json.loads(line) for line in file)
    except (OSError, ValueError) as error:
        raise BigbatchError(f"{path} cannot be read: {error}.") from error


def _ranks(config: TrainConfig) -> RankContext:
    """Return the ranks of the default process group; a single process without one. Collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    found = RankContext(dist.get_world_size(), dist.get_rank(), 1, config.parallel)
    hosts = found.all_gather(socket.gethostname())
    return replace(found, local_size=hosts.count(hosts[found.rank]))


def _with_own_device(config: TrainConfig, ranks: RankContext) -> TrainConfig:
    """Replace ``cuda:N`` by the current device of each of several ranks."""
    is_numbered = ranks.size > 1 and config.device.startswith("cuda:")
    return config.model_copy(update={"device": "cuda"}) if is_numbered else config


def _set_up(
    config: TrainConfig,
    inputs: PassedInputs,
    loss_fn: Callable[[Any, Any], Any] | None,
    ranks: RankContext,
    order_version: int = ORDER_VERSION,
) -> TrainingSetup:
    if config.objective != "sft" and (loss_fn is not None or inputs.dataset is not None):
        what = "a loss_fn" if loss_fn is not None else "a passed dataset"
        raise InputError(
            f"objective {config.objective} is not supported with {what}: name a file of records in the setting data."
        )
    if loss_fn is not None:
        if config.layout == "packed" or config.compile == "graphs":
            setting = "layout packed" if config.layout == "packed" else "compile graphs"
            raise InputError(f"{setting} is not supported with a loss_fn. Leave the setting out.")
        config = config.model_copy(update={"layout": "padded"})
    data_loader: Any = DataLoader if inputs.dataset is None else partial(PassedDataLoader, inputs)
    setup = set_up_training(config, ranks=ranks, order_version=order_version, data_loader=data_loader)
    if loss_fn is None:
        return replace(setup, passed=inputs.facts)
    notes = setup.notes
    if setup.model_setup.balanced is not None:
        if config.router_aux_loss_coef is not None:
            raise InputError(
                "router_aux_loss_coef does nothing with a loss_fn: add the loss of the experts to loss_fn."
            )
        notes = (*notes, "the load-balancing loss of the experts is not trained: loss_fn is the whole loss")
    tokenizer = setup.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model_setup = replace(
        setup.model_setup,
        loss_fn=CustomLoss(loss_fn, setup.device_spec),
        collate=partial(collate_more, pad_id=pad),
        uses_cuda_graphs=False,
        balanced=None,
    )
    widen_for_loss(model_setup, setup.training, setup.device_spec.device)
    return replace(setup, model_setup=model_setup, passed=inputs.facts, notes=notes)
