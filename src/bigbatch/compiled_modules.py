"""Which modules torch.compile runs, and compiled code that is a function of its inputs alone.

Without more, torch.compile chooses kernels by timing, by the sizes of the first inputs, and by what it finds in caches
on disk; and it compiles again for inputs that no earlier code accepts, so that the code for an input depends on those
before it. `FixedCode` is compiled for inputs that the caller chooses, and runs other inputs in eager mode.
"""

from collections.abc import Callable
from functools import reduce
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config as shape_config
from torch import nn

MIX_REDUCTIONS = "triton.mix_order_reduction_non_strict_mode"
"""Option of Inductor to fuse the two reductions of a norm's backward for any number of tokens.

Without it that depends on their number, and the layers are compiled once for fewer tokens and once for more.
"""

FIXED_OPTIONS: dict[str, Any] = {
    # nothing is chosen by timing, whatever the environment variables of Inductor are
    "deterministic": True,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "max_autotune_gemm": False,
    "coordinate_descent_tuning": False,
    "benchmark_kernel": False,
    "benchmark_fusion": False,
    "benchmark_combo_kernel": False,
    "combo_kernels": False,
    "triton.multi_kernel": 0,
    "triton.autotune_pointwise": False,
    "triton.mix_order_reduction_autotune_split_size": False,
    # the number of tokens does not decide which reductions are one kernel: code for more or fewer would be other code
    MIX_REDUCTIONS: True,
    # no code is read from disk: the keys of graphs have no sizes, for which their kernels were chosen
    "fx_graph_cache": False,  # without it, AOTAutograd reads none either
    "fx_graph_remote_cache": False,
    "autotune_local_cache": False,
    "autotune_remote_cache": False,
    "bundled_autotune_remote_cache": False,
}
"""Options of Inductor with which kernels follow from the graph and the sizes for which it is compiled."""


class FixedCode:
    """Code that calls of modules or functions share: compiled for each kind of input until `fix`, for none after it.

        run(called, inputs) = the code that was compiled for such inputs between `compile` and `fix`; else eager mode

    Which of them runs follows from the guards of the compiled code, hence from the inputs. A graph break is an error,
    because the parts of a broken graph share code with all other compiled modules of the process.

    Args:
        backend: As for ``torch.compile``.
        options: Of the backend; None for its defaults.

    Attributes:
        is_fixed: Whether `fix` was called.
        num_calls: Calls since then with deterministic algorithms, as in training, not of modules in evaluation mode;
            recomputation in backward counts as well.
        num_eager_calls: Those that ran in eager mode.
    """

    def __init__(self, backend: str | Callable[..., Any], options: dict[str, Any] | None = None) -> None:
        # torch finds compiled code by the code object: a new one has none of an earlier model's
        self._function = FunctionType(_call.__code__.replace(), globals(), _call.__name__)
        self._backend = backend
        # an option that another release of torch does not have chooses nothing there
        self._options = known_options(options) if backend == "inductor" and options is not None else options
        self._compiled: Callable[..., Any] | None = None
        self.is_fixed = False
        self.num_calls = 0
        self.num_eager_calls = 0

    @property
    def is_compiled(self) -> bool:
        """Whether there is code; otherwise every call runs in eager mode."""
        return self._compiled is not None

    def compile(self) -> None:
        """Compile for every input from now on that has no code.

        Raises:
            ValueError: The environment overrides an option.
        """
        if self._backend == "inductor":
            _check_options(self._options or {})
        self._compiled = torch.compile(
            self._function, dynamic=True, fullgraph=True, backend=self._backend, options=self._options
        )

    def fix(self) -> None:
        """Compile nothing from now on."""
        self._compiled = torch._dynamo.run(self._function)
        self.is_fixed = True
        self.num_calls = self.num_eager_calls = 0

    def decompile(self) -> None:
        """Return to eager mode, in which it is before `compile` too."""
        self._compiled = None

    def run(self, called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module or a function."""
        self.num_calls += _is_counted(called)
        if self._compiled is None:
            return self._run_eagerly(called, args, kwargs)
        if self.is_fixed:
            return self._compiled(called, self._run_eagerly, args, kwargs)
        shapes: Any = shape_config
        # here, since each thread has its own settings and backward, which recomputes, may run in another one
        with (
            # sizes are dynamic from the start; the sizes that earlier models had at this place do not matter
            torch._dynamo.config.patch(automatic_dynamic_shapes=False, specialize_float=True, specialize_int=True),
            # sizes that are equal by chance, such as a length and the width, may differ in later inputs
            shapes.patch(use_duck_shape=False),
        ):
            return self._compiled(called, self._run_eagerly, args, kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _run_eagerly(self, called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run in eager mode, that is also without code that others have compiled for parts of it."""
        self.num_eager_calls += _is_counted(called)
        return _inner(called)(*args, **kwargs)


def _check_options(options: dict[str, Any]) -> None:
    """Check that options of Inductor have an effect: some environment variables of torch have precedence."""
    from torch._inductor import config

    settings: Any = config
    with settings.patch(options):
        for name, value in options.items():
            if (found := reduce(getattr, name.split("."), settings)) != value:
                raise ValueError(f"the environment sets {name} of Inductor to {found}, and it has to be {value}")


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those of some options that the Inductor of this torch has; it refuses to compile with any other."""
    import torch._inductor

    known = {*torch._inductor.list_options(), "deterministic"}  # without the last, compilation is refused
    return {name: value for name, value in options.items() if name in known}


def _call(
    called: Callable[..., Any], eagerly: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _inner(called)(*args, **kwargs)
    return eagerly(called, args, kwargs)


def _inner(called: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a call of a module runs that is not compiled."""
    return called._call_impl if isinstance(called, nn.Module) else called


def _is_counted(called: Callable[..., Any]) -> bool:
    is_trained = not isinstance(called, nn.Module) or called.training
    return is_trained and torch.are_deterministic_algorithms_enabled()


class FixedCall:
    """A module's compiled call that runs `FixedCode`.

    Args:
        code: Whose code it runs.
        run: Called with the inputs of the module.
    """

    def __init__(self, code: FixedCode, run: Callable[..., Any]) -> None:
        self._code, self._run = code, run

    @property
    def is_fixed(self) -> bool:
        """Whether the code follows from the inputs alone."""
        return self._code.is_fixed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._run(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of this module run compiled code: by ``module.compile()``, or wrapped by torch.compile."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def has_compiled(model: nn.Module) -> bool:
    """Return whether calls of the model or of a module in it run compiled code."""
    return any(map(is_compiled, model.modules()))


def has_fixed_code(module: nn.Module) -> bool:
    """Return whether the compiled code that calls of this module run follows from their inputs alone."""
    call = module._compiled_call_impl
    return isinstance(call, FixedCall) and call.is_fixed and "_orig_mod" not in module._modules
