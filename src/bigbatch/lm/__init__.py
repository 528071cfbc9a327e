"""Language-model trainer: data, tokenizer, model, loss and training loop on top of exact gradient accumulation.

    config, dataset, loss_fn, callbacks → train → RunResult and a run directory

Importing this package loads neither torch nor transformers; its names do when they are first used.
"""

from typing import TYPE_CHECKING

from bigbatch.lazy_names import lazy_names

if TYPE_CHECKING:
    from bigbatch.lm.config.train_config import TrainConfig as TrainConfig
    from bigbatch.lm.training.api import train as train
    from bigbatch.lm.training.user_callbacks import Callback as Callback
    from bigbatch.lm.training.user_callbacks import RunResult as RunResult
    from bigbatch.lm.training.user_callbacks import RunStart as RunStart
    from bigbatch.lm.training.user_callbacks import StopTraining as StopTraining

_PUBLIC = {
    "Callback": "bigbatch.lm.training.user_callbacks",
    "RunResult": "bigbatch.lm.training.user_callbacks",
    "RunStart": "bigbatch.lm.training.user_callbacks",
    "StopTraining": "bigbatch.lm.training.user_callbacks",
    "TrainConfig": "bigbatch.lm.config.train_config",
    "train": "bigbatch.lm.training.api",
}

__all__ = ["Callback", "RunResult", "RunStart", "StopTraining", "TrainConfig", "train"]


if not TYPE_CHECKING:  # else, type checkers would accept every name
    __getattr__ = lazy_names(globals(), _PUBLIC)


def __dir__() -> list[str]:
    return sorted(__all__)
