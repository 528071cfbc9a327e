"""Warnings of the frameworks that no test of ours is about."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

FRAMEWORK_WARNINGS = [
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated and will be removed in v6:FutureWarning",
    "ignore:`SentenceTransformer` only defines `gradient_checkpointing_enable`:FutureWarning",
    "ignore:`broadcast_buffers` is deprecated:FutureWarning",
    "ignore:torch.distributed.nn.functional.[a-z_]+ is deprecated:FutureWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignore these warnings in the tests of this folder."""
    for item in items:
        if "integrations" in item.path.parts:
            for text in FRAMEWORK_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(text))


@contextmanager
def ignored(filters: Sequence[str]) -> Iterator[None]:
    """Ignore warnings inside, in processes that pytest does not run."""
    with warnings.catch_warnings():
        for text in filters:
            action, message, category = text.split(":")
            warnings.filterwarnings(action, message, {"UserWarning": UserWarning}.get(category, FutureWarning))  # type: ignore[arg-type]
        yield
