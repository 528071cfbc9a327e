"""Check the Hugging Face Hub once, before a library that retries for a long time."""

from pathlib import Path
from typing import Literal

from bigbatch.errors import InputError

TIMEOUT_S = 10.0


def is_on_hub(name: str, kind: Literal["dataset", "model"]) -> bool:
    """Return whether the hub has ``name``; False also if it cannot be reached or offline mode is on. One request.

    The loaders of the libraries retry an unreachable hub, 23 s for datasets and 46 s for transformers (measured
    without a network), and print a line for each attempt.

    Raises:
        InputError: The hub has no such dataset or model, or the name is not a valid one.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    get_info = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        get_info(name, timeout=TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError):
        raise InputError(f"{name!r} is neither a path on this machine nor a {kind} on the hub.") from None
    except HfHubHTTPError:
        return True  # it is reachable; the loader reports the error in detail
    except Exception:  # noqa: BLE001  the network errors of the hub's client differ between versions
        return False
    return True


def is_local(model: str) -> bool:
    """Return whether a model must be loaded from this machine: it is a folder, or the hub cannot be reached.

    Raises:
        InputError: As :func:`is_on_hub`.
    """
    return Path(model).is_dir() or not is_on_hub(model, "model")
