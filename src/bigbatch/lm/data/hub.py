"""One quick question to the hub before a library asks it slowly."""

from pathlib import Path
from typing import Literal

from bigbatch.errors import InputError

TIMEOUT_S = 10.0


def hub_answers(name: str, kind: Literal["dataset", "model"]) -> bool:
    """Ask the hub for ``name``, once: True if it has it, False if it cannot be reached or must not be (offline mode).

    The loaders of the libraries retry an unreachable hub, 23 s for datasets and 46 s for transformers (measured
    without a network), and print a line for each attempt.

    Raises:
        InputError: The hub answers that it has no such dataset or model, or the name is not one it could have.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        ask(name, timeout=TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError):
        raise InputError(f"{name!r} is neither a path on this machine nor a {kind} on the hub.") from None
    except HfHubHTTPError:
        return True  # it answers; what it refuses is for the loader to say
    except Exception:  # noqa: BLE001  the hub's client, and so its network errors, differs between versions
        return False
    return True


def is_local(model: str) -> bool:
    """Return whether a model must come from this machine: it is a folder, or the hub cannot be reached.

    Raises:
        InputError: As :func:`hub_answers`.
    """
    return Path(model).is_dir() or not hub_answers(model, "model")
