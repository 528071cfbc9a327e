"""Run the batches of a SentenceTransformerTrainer on an engine: its collator, its model, its loss on all embeddings.

samples → micro-batches (collator) → embeddings of each column → the trainer's compute_loss on all → two passes
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bigbatch.coupled.coupled import Coupled
from bigbatch.engine.engine import Engine
from bigbatch.errors import InputError
from bigbatch.integrations.sentence_transformers.cached_losses import cached_losses, forward_from_embeddings
from bigbatch.integrations.sentence_transformers.checks import (
    CoupledSettings,
    bare_module,
    check_losses,
    gathers,
    losses_of,
)
from bigbatch.integrations.sentence_transformers.embedding import check_columns, embed, embed_by_guide, guided_losses
from bigbatch.integrations.sentence_transformers.playback import (
    played_back,
    played_features,
    played_inputs,
    played_model,
)
from bigbatch.integrations.transformers.loss_collectives import CollectiveWatch
from bigbatch.integrations.transformers.own_loss import ComputeLoss
from bigbatch.integrations.transformers.own_parameters import (
    clear_gradients,
    model_for_engine,
    model_of_engine,
    other_parameters,
)
from bigbatch.integrations.transformers.samples import WindowBatch, copy_samples
from bigbatch.integrations.transformers.traceless import attribute, fresh
from bigbatch.integrations.transformers.unit_refusals import class_name
from bigbatch.integrations.transformers.window_hand_over import WindowHandOver, warn_of_batch_norms
from bigbatch.trials.trial import is_trial
from bigbatch.window_report import WindowReport


@dataclass
class _Batch:
    """The batch of one update.

    Attributes:
        samples: Not collated.
        dataset: The name of their dataset; None if there is only one.
        collated: Micro-batches, by their rows, for the second pass.
        guides: Embeddings by the guides of the loss, by rows.
        components: Of a loss that returns several, of the last call.
    """

    samples: Sequence[Any] = ()
    dataset: str | None = None
    collated: dict[tuple[int, ...], Any] = field(default_factory=dict)
    guides: dict[tuple[int, ...], list[list[Tensor]]] = field(default_factory=dict)
    components: Mapping[str, Tensor] = field(default_factory=dict)


class _Rows:
    """The samples of a micro-batch; one value among its tensors."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.key = tuple(rows)


class CoupledWindows:
    """Computes the loss of the batches of one trainer.

    Args:
        trainer: Its arguments, collator, loss and accelerator are read when they are used.
        settings: Of `exact`.
    """

    def __init__(self, trainer: Any, settings: CoupledSettings) -> None:
        self._trainer = trainer
        self._settings = settings
        self._engine: Engine | None = None
        self._made_for: tuple[Any, ...] = ()
        self._losses: list[nn.Module] = []  # the engine keeps their buffers
        self._hand_over = WindowHandOver(trainer)
        self._compute_loss: ComputeLoss = trainer.compute_loss
        self._batch = _Batch()

    def loss(self, model: nn.Module, window: WindowBatch, compute_loss: ComputeLoss) -> tuple[Tensor, WindowReport]:
        """Return the loss of a batch, 0-d, whose backward is the exact gradient, and the report. Collective.

        Args:
            model: As the trainer passes it to its loss, in its wrapper.
            window: With at least one sample.
            compute_loss: Of the trainer.

        Raises:
            InputError: The loss cannot be computed from embeddings.
            MemoryLimitError: The loss, or a single sample, does not fit in memory.
        """
        if window.is_collated:
            raise InputError(
                f"the train dataloader of {class_name(self._trainer)} yields batches that are collated already, which "
                "cannot be cut into micro-batches: collate with self.data_collator in get_train_dataloader."
            )
        self._compute_loss, self._batch = compute_loss, _Batch(window.samples, _dataset_of(window.samples))
        engine = self._engine_for(model)
        try:
            loss, report = self._hand_over.run(engine, range(len(window.samples)))
            if self._batch.components:
                self._trainer.track_loss_components(self._batch.components)
        finally:
            self._batch = _Batch()  # frees the samples
        return loss, report

    def _engine_for(self, model: nn.Module) -> Engine:
        """Return the engine for a model and its losses; another one if they changed since the last batch."""
        trainer = self._trainer
        others = other_parameters(trainer, model)
        clear_gradients(others)
        self._losses = losses_of(trainer)
        made_for = (model, *self._losses, *others)
        if self._engine is not None and tuple(map(id, made_for)) == tuple(map(id, self._made_for)):
            return self._engine
        check_losses(trainer)
        warn_of_batch_norms(model)
        together, sync = model_for_engine(trainer, model, others)
        try:
            self._engine = Engine(
                together,
                None,
                Coupled(self._encode, self._loss, gather="all" if gathers(trainer) else "none"),
                microbatch=self._settings.size,
                memory=self._settings.memory,
                collate=self._collate,
                scaler=trainer.accelerator.scaler,
                sync=sync,
                check=False,
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        self._made_for, self._hand_over = made_for, WindowHandOver(trainer)
        return self._engine

    def _collate(self, rows: Sequence[int]) -> dict[str, Any]:
        """Make one micro-batch of samples of the batch; that of the first pass again in the second."""
        known, key = self._batch.collated, _Rows(rows)
        inputs = known.get(key.key)
        if inputs is None:
            inputs = self._trainer.data_collator(copy_samples([self._batch.samples[row] for row in rows]))
            if not is_trial():
                known[key.key] = inputs
        return {"inputs": fresh(inputs), "rows": key}

    def _encode(self, model: nn.Module, microbatch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the embeddings of each column, those by guides, and the labels."""
        trainer = self._trainer
        inputs = trainer._prepare_inputs(microbatch["inputs"])
        columns, labels = trainer.collect_features({k: v for k, v in inputs.items() if k != "dataset_name"})
        check_columns(columns)
        embeddings = embed(model_of_engine(model), columns)
        return {"embeddings": embeddings, "guides": self._guides(columns, microbatch["rows"].key), "labels": labels}

    def _guides(self, columns: Sequence[Any], key: tuple[int, ...]) -> list[list[Tensor]]:
        """Return the embeddings by each guide of the loss; those of the first pass again in the second."""
        guided = guided_losses(self._loss_module())
        known = self._batch.guides.get(key)
        if known is None:
            known = [embed_by_guide(loss, columns) for loss in guided]
            if guided and not is_trial():
                self._batch.guides[key] = known
        return [list(embeddings) for embeddings in known]

    def _loss_module(self) -> nn.Module:
        loss: Any = self._trainer.loss
        if isinstance(loss, dict):
            loss = loss[self._batch.dataset]
        return loss  # type: ignore[no-any-return]

    def _loss(self, _model: nn.Module, features: Mapping[str, Any]) -> Tensor:
        """Return the trainer's loss of all embeddings."""
        trainer, loss = self._trainer, self._loss_module()
        embeddings, labels = features["embeddings"], features["labels"]
        labels = labels.detach() if isinstance(labels, Tensor) else labels
        bare = bare_module(trainer.model)
        played = played_model(bare, embeddings, loss)
        guides = {}
        with ExitStack() as stack:
            for guided, by_guide in zip(guided_losses(loss), features["guides"], strict=True):
                guides[guided] = played_model(guided.guide, by_guide, loss)
                stack.enter_context(attribute(guided, "must_retokenize", False))
            stack.enter_context(played_back(loss, bare, played, guides))
            for cached in cached_losses(loss):
                forward = forward_from_embeddings(cached, in_float32=trainer.accelerator.scaler is not None)
                stack.enter_context(attribute(cached, "forward", forward))
            columns = played_features(len(embeddings))
            stack.enter_context(attribute(trainer, "collect_features", lambda _inputs: (columns, labels)))
            stack.enter_context(attribute(trainer, "track_loss_components", self._note_components))
            watch = CollectiveWatch() if trainer.accelerator.num_processes > 1 else None  # type: ignore[no-untyped-call]
            stack.enter_context(watch or nullcontext())
            value: Tensor = self._compute_loss(
                played, played_inputs(labels, self._batch.dataset), num_items_in_batch=None
            )
        if watch is not None and watch.was_called:
            raise InputError(
                f"{type(loss).__name__} calls torch.distributed, and ranks may compute it at different times: use "
                "gather_across_devices=True of MultipleNegativesRankingLoss or GISTEmbedLoss."
            )
        return value

    def _note_components(self, components: Mapping[str, Tensor]) -> None:
        self._batch.components = {name: value.detach() for name, value in components.items()}


def _dataset_of(samples: Sequence[Any]) -> str | None:
    """Return the name of the dataset of all samples; None without names.

    Raises:
        InputError: They have several.
    """
    names = {sample.get("dataset_name") if isinstance(sample, Mapping) else None for sample in samples}
    if len(names) > 1:
        raise InputError(
            f"a batch has samples of several datasets ({', '.join(sorted(map(str, names)))}), whose losses may differ: "
            "use a batch sampler whose batches are of one dataset."
        )
    name: str | None = names.pop()
    return name
