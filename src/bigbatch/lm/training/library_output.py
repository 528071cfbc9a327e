"""Output of the libraries under the trainer: their progress bars and warnings, which a run does not show.

`silence_libraries` is for a process of the command, `silent_libraries` for a call in a user's process.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module


def silence_libraries() -> None:
    """Disable the progress bars and warnings of transformers, and what bitsandbytes says when peft imports it."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Silence the libraries inside, as `silence_libraries` does, then restore the settings that were found.

    These are the levels of the two loggers, and the progress bars of transformers and huggingface_hub, which
    transformers enables and disables together.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_verbosity()  # sets the default level, if nothing has yet
    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "transformers")}
    has_bars = transformers_logging.is_progress_bar_enabled()
    hub_bars: dict[str, bool] = import_module("huggingface_hub.utils.tqdm").progress_bar_states  # by group
    hub_bars_before = dict(hub_bars)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # HF_HUB_DISABLE_PROGRESS_BARS has priority over the call
            silence_libraries()
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if has_bars:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                transformers_logging.enable_progress_bar()
        hub_bars.clear()
        hub_bars.update(hub_bars_before)
