"""Products in float8 on the CPU, emulated: the mark and the fixture of their tests."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed: make test-versions runs this with the newest dependencies",
)
quiet_torchao = pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")


@pytest.fixture
def emulated_fp8(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allow ``--precision fp8`` on the CPU, where values are rounded to float8 and multiplied in float32."""
    monkeypatch.setattr("bigbatch.lm.device.fp8_obstacle", lambda device: None)
    yield
    torch._dynamo.reset()
