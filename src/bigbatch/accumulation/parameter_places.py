"""The places of parameters in a model, to notice a parameter that other code replaces: no optimizer has the new one."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from bigbatch.errors import WindowStateError


class ParameterPlaces:
    """Where a model holds the parameters that are trained: by module and name.

    ``load_state_dict(assign=True)``, an assignment or a new layer put another parameter in such a place. It would
    receive no gradient, and the loss would not depend on the old one. So do parametrizations with parameters of their
    own. A new one that is trained as well, as by tying two weights, or that is frozen is no error.

    Args:
        model: The module being trained; None to notice nothing. Sharded parameters are left out: their wrapper replaces
            them by whole ones and back.
        parameters: The parameters that are trained.

    Attributes:
        tables: The parameters of a module, or its children.
        keys: A name in each.
        values: What had that name.
    """

    def __init__(self, model: nn.Module | None, parameters: Iterable[Tensor]) -> None:
        self._model = model if isinstance(model, nn.Module) else None  # refused by its user otherwise
        self._note(parameters)

    def _note(self, parameters: Iterable[Tensor]) -> None:
        self._named: dict[str, Tensor] = {}
        self.tables: list[dict[str, Any]] = []  # of modules, with a key and its value each
        self.keys: list[str] = []
        self.values: list[Any] = []
        self._others: set[Tensor] = set()  # parameters of the model that are not trained here
        if self._model is None:
            return
        wanted = {parameter for parameter in parameters if not hasattr(parameter, "to_local")}
        for prefix, module in self._model.named_modules():
            for table in (module._parameters, module._modules):
                for key, value in table.items():
                    if value in wanted:
                        self._named[f"{prefix}.{key}" if prefix else key] = value
                    elif table is module._parameters:
                        if value is not None:
                            self._others.add(value)
                        continue
                    self.tables.append(table)
                    self.keys.append(key)
                    self.values.append(value)

    def check(self, parameters: Sequence[Tensor]) -> None:
        """Raise if a parameter was replaced by one that is not trained; call it if any value is another one now.

        Args:
            parameters: Those that are trained.

        Raises:
            WindowStateError: One was.
        """
        trained = set(parameters)
        replaced = self._replaced(trained)
        if replaced:
            more = f" (and {len(replaced) - 1} more)" if len(replaced) > 1 else ""
            raise WindowStateError(
                f"the parameter {replaced[0]!r}{more} of the model was replaced by another one, which no optimizer "
                "has, by load_state_dict(assign=True), an assignment or a new layer. Copy values into the parameters "
                "that are trained, or make optimizer and engine when the model has its final form."
            )
        self._note(trained)

    def _replaced(self, trained: set[Tensor]) -> list[str]:
        """Return the names of parameters in whose place, or in whose module, there is a new one that is not trained."""
        assert self._model is not None, "else there is nothing to compare"
        found = dict(self._model.named_parameters())
        present = set(found.values())
        new = [n for n, p in found.items() if p.requires_grad and p not in trained and p not in self._others]
        modules = {name[:end] for name in new for end in _ends(name)}  # of the new ones, and those around them
        return [
            name
            for name, old in self._named.items()
            if name in new or (old not in present and name.rpartition(".")[0] in modules)
        ]


def _ends(name: str) -> Iterator[int]:
    """Yield where the names of the modules end that contain a parameter; 0 for the outermost one."""
    yield 0
    for position, character in enumerate(name):
        if character == ".":
            yield position
