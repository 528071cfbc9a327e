"""A pytest plugin that switches an integration on in the tests of a framework; `framework_tests.py` loads it.

    pytest -p switch_integrations --integration transformers --integration-log FILE ...

- transformers: `exact` is called on every Trainer when it starts to train; with ``items=`` the number of labels if the
  model draws random numbers of its own, whose unit `exact` refuses to find.
- accelerate: ``Accelerator`` is `ExactAccelerator`; ``backward(mean)`` has no items and so is accelerate's.
- accelerate-items: the same, and every ``backward(mean)`` of a prepared model is ``backward(16 · mean, items=16)``;
  that of another model, which tests compare with, is accelerate's.
- lightning: every ``Trainer`` has `ExactAccumulation`, and every ``training_step`` of a module with automatic
  optimization returns the loss with ``items=1``.

The log has a line for every use and every refusal: the name of the test, "on" or "refused", and the sentence.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BATCH = 16  # items of every micro-batch in accelerate's tests
REMOVED_NAMES = ("GlueDataset", "GlueDataTrainingArguments", "LineByLineTextDataset")  # imported by older test files


class Log:
    """Appends what happened in a test to a file.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.test = ""

    def write(self, event: str, sentence: str = "") -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\t".join((self.test, event, " ".join(sentence.split()))) + "\n")


def switch_transformers_on(log: Log) -> None:
    """Call `exact` on every Trainer when it starts to train; one that is refused trains as it is."""
    import transformers.testing_utils  # noqa: F401  replaces transformers in sys.modules
    from transformers import Trainer

    from bigbatch import InputError
    from bigbatch.integrations.transformers import exact
    from bigbatch.integrations.transformers.trainer_mixin import ExactMixin

    stock = Trainer.train

    @functools.wraps(stock)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, ExactMixin):
            is_random = type(self.model).__name__.startswith("RegressionRandom")
            try:
                exact(self, **({"items": _num_labels} if is_random else {}))
            except InputError as error:
                log.write("refused", str(error))
            else:
                log.write("on")
        try:
            return stock(self, *args, **kwargs)
        except InputError as error:
            log.write("refused", str(error))
            raise

    Trainer.train = train


def _num_labels(inputs: Any) -> int:
    return int(inputs["labels"].numel())


def supply_removed_names() -> None:
    """Let test files import names that transformers has removed since; tests that use them fail in both runs."""
    import transformers.testing_utils  # noqa: F401  replaces transformers in sys.modules

    package = sys.modules["transformers"]
    for name in REMOVED_NAMES:
        if not hasattr(package, name):
            setattr(package, name, type(name, (), {}))


def switch_accelerate_on(log: Log, *, with_items: bool = False) -> None:
    """Make every ``Accelerator`` an `ExactAccelerator`, which may receive sums and items."""
    import accelerate
    import accelerate.accelerator

    from bigbatch.integrations.accelerate import ExactAccelerator
    from bigbatch.integrations.item_totals import reached_parameters

    stock = accelerate.Accelerator

    class Accelerator(ExactAccelerator):
        def backward(self, loss: Any, **kwargs: Any) -> None:
            log.write("on")
            if with_items:
                prepared = {id(parameter) for model in self._models for parameter in model.parameters()}
                if any(id(parameter) in prepared for parameter in reached_parameters(loss)):
                    super().backward(loss * BATCH, items=BATCH, **kwargs)
                else:
                    stock.backward(self, loss, **kwargs)
            else:
                super().backward(loss, **kwargs)

    accelerate.Accelerator = accelerate.accelerator.Accelerator = Accelerator


def switch_lightning_on(log: Log) -> None:
    """Add `ExactAccumulation` to every Trainer, and items to what every ``training_step`` returns."""
    from collections.abc import Mapping

    from lightning.pytorch import Trainer
    from torch import Tensor

    from bigbatch import InputError
    from bigbatch.integrations.lightning import ExactAccumulation

    class Exact(ExactAccumulation):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            try:
                super().setup(trainer, pl_module, stage)
            except InputError as error:
                log.write("refused", str(error))
            else:
                log.write("on" if stage == "fit" else "idle")

        def _note(self, trainer: Any, pl_module: Any, output: Any) -> Any:
            if output is None:
                return None
            found = dict(output) if isinstance(output, Mapping) else {"loss": output}
            if not isinstance(found.get("loss"), Tensor):
                return output  # for Lightning's own check
            return super()._note(trainer, pl_module, {**found, "items": found.get("items", 1)})

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if pl_module.automatic_optimization:
                super().on_before_optimizer_step(trainer, pl_module, optimizer)

    stock = Trainer.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, callbacks: Any = None, **kwargs: Any) -> None:
        own = [] if callbacks is None else [callbacks] if not isinstance(callbacks, list) else callbacks
        stock(self, *args, callbacks=[*own, Exact()], **kwargs)

    Trainer.__init__ = init


SWITCHES: dict[str, Callable[[Log], None]] = {
    "transformers": switch_transformers_on,
    "accelerate": switch_accelerate_on,
    "accelerate-items": functools.partial(switch_accelerate_on, with_items=True),
    "lightning": switch_lightning_on,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    parser.addoption("--integration", choices=tuple(SWITCHES), help="switch this integration on")
    parser.addoption("--integration-log", type=Path, help="file for what happened in each test")
    parser.addoption("--older-tests", action="store_true", help="supply names that transformers removed")


def pytest_configure(config: pytest.Config) -> None:
    """Switch the integration on before any test file is imported."""
    if config.getoption("--older-tests"):
        supply_removed_names()
    name = config.getoption("--integration")
    if name is not None:
        log = Log(config.getoption("--integration-log").absolute())
        config.stash[_LOG] = log
        SWITCHES[name](log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note the test that runs."""
    log = item.config.stash.get(_LOG, None)
    if log is not None:
        log.test = item.nodeid


_LOG = pytest.StashKey[Log]()
