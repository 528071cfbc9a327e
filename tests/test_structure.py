"""The shape of the code: sizes of modules, the length of `Engine.step`, and the files that one update runs through."""

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch

PACKAGE = Path(bigbatch.__file__).parent
LONG, TOO_LONG = 300, 350


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_long_module_gives_its_reason(path: Path):
    source = path.read_text(encoding="utf-8")
    num_lines = len(source.splitlines())
    assert num_lines <= TOO_LONG
    if num_lines > LONG:
        assert "\nLong because " in (ast.get_docstring(ast.parse(source)) or ""), f"{num_lines} lines without a reason"


@pytest.mark.parametrize("package", ["accumulation", "distributed", "engine", "execution"])
def test_core_assigns_no_field_of_another_object(package: str):
    found = set()
    for path in (PACKAGE / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) != "self"
            ):
                found.add(node.attr)
    of_fsdp = {"reduce_grads", "all_reduce_grads", "_partial_reduce_output", "unsharded_accumulated_grad"}
    assert found <= {"grad", *of_fsdp}


def test_engine_step_is_one_short_loop():
    (step,) = ast.parse(textwrap.dedent(inspect.getsource(bigbatch.Engine.step))).body
    assert isinstance(step, ast.FunctionDef)
    first = step.body[1]  # after the docstring
    assert step.end_lineno is not None
    assert step.end_lineno - first.lineno + 1 <= 30
    nodes = list(ast.walk(step))
    assert sum(isinstance(node, ast.If | ast.IfExp | ast.BoolOp) for node in nodes) <= 4
    assert sum(isinstance(node, ast.FunctionDef | ast.Lambda) for node in nodes) == 1, "no inner function"


def test_plain_update_runs_through_few_files():
    def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, targets = microbatch
        return F.mse_loss(model(inputs), targets, reduction="sum"), targets.numel()

    model = nn.Linear(4, 2)
    engine = bigbatch.Engine(model, torch.optim.AdamW(model.parameters()), loss_fn, microbatch=4, noise=False)
    batch = torch.randn(10, 4), torch.randn(10, 2)
    engine.step(batch)
    files = set()

    def note(frame: FrameType, _event: str, _argument: object) -> None:
        files.add(frame.f_code.co_filename)

    tracer = sys.gettrace()
    sys.settrace(note)
    try:
        engine.step(batch)
    finally:
        sys.settrace(tracer)
    assert len([file for file in files if Path(file).is_relative_to(PACKAGE)]) <= 18
