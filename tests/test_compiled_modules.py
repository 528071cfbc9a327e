"""Compiled code that is fixed after the first inputs: what runs follows from the inputs, not from earlier ones."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bigbatch.compiled_modules import FIXED_OPTIONS, FixedCall, FixedCode, has_fixed_code, is_compiled
from bigbatch.deterministic import deterministic_kernels
from support.hinted_compiler import HintedCompiler


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with deterministic_kernels():
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """A module that torch.compile compiles as a whole, other than those of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows)


def fixed(module: Callable[..., Any], *inputs: Tensor, backend: Any = "eager") -> FixedCode:
    code = FixedCode(backend)
    code.compile()
    for each in inputs:
        code.run(module, (each,), {})
    code.fix()
    return code


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_later_sizes_run_the_compiled_code() -> None:
    linear = nn.Linear(4, 3)
    code = fixed(linear, torch.randn(5, 4))
    compiled = graphs()
    for length in (2, 7, 64):
        rows = torch.randn(length, 4)
        assert torch.equal(code.run(linear, (rows,), {}), linear(rows))
    assert (graphs(), code.num_calls, code.num_eager_calls) == (compiled, 3, 0)


def test_sizes_that_are_equal_by_chance_may_differ_later() -> None:
    linear = nn.Linear(4, 4)
    code = fixed(linear, torch.randn(4, 4))
    code.run(linear, (torch.randn(9, 4),), {})
    assert (code.num_calls, code.num_eager_calls) == (1, 0)


REFUSED: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "one row": lambda: (nn.Linear(4, 3), torch.randn(1, 4)),
    "dtype": lambda: (nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)),
    "gradient of the input": lambda: (nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)),
    "module": lambda: (nn.Linear(4, 3, bias=False), torch.randn(5, 4)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_inputs_without_code_run_eagerly(kind: str) -> None:
    code = fixed(nn.Linear(4, 3), torch.randn(5, 4))
    compiled = graphs()
    module, rows = REFUSED[kind]()
    assert torch.equal(code.run(module, (rows,), {}), module(rows))
    assert (graphs(), code.num_calls, code.num_eager_calls) == (compiled, 1, 1)
    module.eval()
    code.run(module, (rows,), {})
    torch.use_deterministic_algorithms(False)
    code.run(module.train(), (rows,), {})
    assert (code.num_calls, code.num_eager_calls) == (1, 1), "neither validation nor trials are counted"


def test_code_depends_on_its_own_first_inputs_alone() -> None:
    """Compiled modules of the process share code objects, which is where torch finds the code for an input."""
    linear, rows = Layer(), torch.randn(6, 4)
    results = []
    for before in ((), (3, 17)):
        backend = HintedCompiler()
        for length in before:
            fixed(linear, torch.randn(length, 4), backend=backend)
            torch.compile(linear._call_impl, dynamic=True, backend=backend)(torch.randn(length, 4))
        results.append(fixed(linear, torch.randn(5, 4), backend=backend).run(linear, (rows,), {}))
        assert backend.sizes[-1] == [5]
    assert torch.equal(*results)
    assert not torch.equal(results[0], linear(rows)), "compiled"


def test_sizes_are_not_remembered_for_later_code() -> None:
    """As torch does for functions of one file, line and name."""
    for length in (5, 1):
        fixed(nn.Linear(4, 3), torch.randn(length, 4))
    states = torch._dynamo.pgo.get_code_state()
    (own,) = [state for code, state in states.items() if code.filename.endswith("bigbatch/compiled_modules.py")]
    assert [entry.size for entry in own.automatic_dynamic.values()] == [(1, 4)], "not that the first size differs"


def test_eager_calls_run_no_code_of_others() -> None:
    layer, rows = Layer(), torch.randn(1, 4)
    others = torch.compile(layer._call_impl, backend=HintedCompiler())
    assert not torch.equal(others(rows), layer.forward(rows))
    code = fixed(layer, torch.randn(5, 4))
    found = code.run(layer, (rows,), {})
    torch._dynamo.reset()
    assert torch.equal(found, layer.forward(rows))
    assert code.num_eager_calls == 1


def test_graph_break_is_an_error() -> None:
    def breaks(rows: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return rows + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        fixed(breaks, torch.randn(5, 4))


def test_code_that_is_not_compiled_runs_eagerly() -> None:
    linear, rows, backend = nn.Linear(4, 3), torch.randn(5, 4), HintedCompiler()
    code = FixedCode(backend)
    assert torch.equal(code.run(linear, (rows,), {}), linear(rows))
    code.compile()
    code.decompile()
    assert torch.equal(code.run(linear, (rows,), {}), linear(rows))
    assert (code.is_compiled, backend.sizes) == (False, [])


def test_only_calls_of_fixed_code_are_known_as_fixed() -> None:
    linear = nn.Linear(4, 3)
    code = FixedCode("eager")
    linear._compiled_call_impl = FixedCall(code, lambda rows: code.run(linear, (rows,), {}))
    code.compile()
    assert (is_compiled(linear), has_fixed_code(linear)) == (True, False)
    linear(torch.randn(5, 4))
    code.fix()
    assert (is_compiled(linear), has_fixed_code(linear)) == (True, True)
    assert not has_fixed_code(torch.compile(linear, backend="eager")), "a wrapper around it"
    linear.compile(backend="eager")
    assert not has_fixed_code(linear)


def test_options_that_this_torch_does_not_have_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **settings: given.update(settings["options"]) or function)
    FixedCode("inductor", {**FIXED_OPTIONS, "of_another_release": False}).compile()
    assert given.keys() == FIXED_OPTIONS.keys() & torch._inductor.config._config.keys()
    assert given["deterministic"]


def test_fixed_options_choose_nothing_by_timing_and_read_no_cache() -> None:
    assert "deterministic" in torch._inductor.config._config
    wanted = {name for name, value in FIXED_OPTIONS.items() if value}
    assert wanted == {"deterministic", "triton.mix_order_reduction_non_strict_mode"}
    assert FIXED_OPTIONS["deterministic"] is True


def test_options_that_the_environment_overrides_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does with TORCHINDUCTOR_FX_GRAPH_CACHE=1."""
    FixedCode("inductor", FIXED_OPTIONS).compile()
    monkeypatch.setattr(torch._inductor.config._config["fx_graph_cache"], "env_value_force", True)
    with pytest.raises(ValueError, match="fx_graph_cache") as refused:
        FixedCode("inductor", FIXED_OPTIONS).compile()
    assert str(refused.value) == "the environment sets fx_graph_cache of Inductor to True, and it has to be False"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_inductor_reads_no_graph_from_its_caches() -> None:
    """Their keys have no sizes: a graph that was compiled for 5 rows would be used for 64."""
    for length in (5, 64):
        rows = torch.randn(length, 4)
        counters.clear()
        linear = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU())
        code = FixedCode("inductor", FIXED_OPTIONS)
        code.compile()
        code.run(linear, (rows,), {}).sum().backward()
        code.fix()
        found = {name: count for kind in counters.values() for name, count in kind.items() if "cache" in name}
        hits = {name: count for name, count in found.items() if "hit" in name or "saved" in name}
        assert hits == {}, found
        expected = linear(rows)
        torch.testing.assert_close(code.run(linear, (rows,), {}), expected)
