"""Compute a loss of sentence-transformers from embeddings that are known, in place of its model.

    features of a column → {its number} → model(features) → {"sentence_embedding": known}

The loss itself is not changed: inside, its models are copies whose forward returns what was embedded before. Whatever
else it asks of a model or of the features of a column raises an error.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from sentence_transformers.base.losses import column_merging_disabled
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import Tensor, nn

from bigbatch.errors import InputError
from bigbatch.integrations.sentence_transformers.checks import bare_module, loss_modules
from bigbatch.integrations.transformers.traceless import attribute

COLUMN = "bigbatch_column"
_EMBEDDING = "sentence_embedding"


class _Strict(dict[str, Any]):
    """A mapping whose missing keys raise, by whatever method they are looked up.

    Args:
        items: Its content.
        what: What it is, for the message.
        absent: Keys that ``in`` finds missing without an error.
    """

    def __init__(self, items: Mapping[str, Any], what: str, absent: Sequence[str] = ()) -> None:
        super().__init__(items)
        self._what, self._absent = what, absent

    def __missing__(self, key: Any) -> Any:
        raise InputError(
            f"the loss reads {key!r} of {self._what}, and exact() knows only the sentence_embedding of each column and "
            "the labels: compute the loss from these, or train without exact()."
        )

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(key) or (key not in self._absent and bool(self.__missing__(key)))

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a value, or raise."""
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove and return a value, or raise."""
        return super().pop(key) if key in self else None


def played_inputs(labels: Tensor | None, dataset: str | None) -> dict[str, Any]:
    """Return inputs for a trainer's ``compute_loss``, without columns."""
    return _Strict({"label": labels, "dataset_name": dataset}, "the inputs")


def played_features(num_columns: int) -> list[dict[str, Any]]:
    """Return the features that a played model recognizes, for each column."""
    return [_Strict({COLUMN: number}, "the features of a column") for number in range(num_columns)]


def played_model(model: nn.Module, embeddings: Sequence[Tensor], loss: nn.Module) -> nn.Module:
    """Return a copy of a model whose forward returns known embeddings; it shares everything else.

    Args:
        model: A SentenceTransformer.
        embeddings: Of each column.
        loss: That calls it.
    """
    # Before version 6.2, MatryoshkaLoss shortens token embeddings as well, if there are any.
    absent = ["token_embeddings"] if any(isinstance(each, MatryoshkaLoss) for each in loss_modules(loss)) else []
    used: set[int] = set()

    def forward(features: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        number = dict(features).get(COLUMN)
        if number is None or options:
            raise InputError(
                f"the loss calls the model with {f'the options {list(options)}' if options else 'other inputs'} than "
                "the columns of the dataset, which exact() embeds in micro-batches: compute it from "
                "model(features)['sentence_embedding'] of each column, or train without exact()."
            )
        if number in used:
            raise InputError(
                f"the loss calls the model twice on column {number + 1}, which draws dropout twice, and exact() embeds "
                "each column once: put the text into two columns of the dataset."
            )
        used.add(number)
        return _Strict({_EMBEDDING: embeddings[number]}, "the output of the model", absent)

    played = copy.copy(model)
    hooks = [name for name in vars(played) if name.endswith("_hooks")]
    vars(played).update({name: OrderedDict() for name in hooks}, forward=forward, _compiled_call_impl=None)
    return played


@contextmanager
def played_back(
    loss: nn.Module, model: nn.Module, played: nn.Module, guides: Mapping[nn.Module, nn.Module]
) -> Iterator[None]:
    """Replace the models of a loss inside; gathering over ranks and merging of columns are off.

    Args:
        loss: The loss.
        model: Of the trainer.
        played: The copy that replaces it.
        guides: The copy that replaces the guide of each module that has one.
    """
    with ExitStack() as stack:
        stack.enter_context(column_merging_disabled())
        for module in list(loss_modules(loss)):
            children = module._modules
            copies = {name: played for name, child in children.items() if child and bare_module(child) is model}
            if module in guides:
                copies["guide"] = guides[module]
            stack.callback(children.update, {name: children[name] for name in copies})
            children.update(copies)
            if vars(module).get("gather_across_devices"):
                stack.enter_context(attribute(module, "gather_across_devices", False))
        yield
