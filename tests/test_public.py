"""The public surface: complete, documented, lazy, and light to import."""

import inspect
import subprocess
import sys

import pytest

import bigbatch


def run(code):
    """A fresh interpreter, for what it has loaded."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


PUBLIC = [name for name in bigbatch.__all__ if name != "__version__"]


def test_all_lists_designed_names():
    assert {"Accumulator", "Engine", "verify", "Verification", "WindowReport", "WindowStateError"} <= set(PUBLIC)
    assert len(set(bigbatch.__all__)) == len(bigbatch.__all__)
    assert dir(bigbatch) == sorted(bigbatch.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_loads_and_has_docstring(name):
    value = getattr(bigbatch, name)
    assert inspect.getdoc(value)
    assert not inspect.getdoc(value).startswith(f"{name}(")  # what a dataclass makes up
    assert value.__module__.startswith("bigbatch.")


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(getattr(bigbatch, name))])
def test_every_public_member_has_docstring(name):
    for member, value in vars(getattr(bigbatch, name)).items():
        if not member.startswith("_") and (callable(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{member}"


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="module 'bigbatch' has no attribute 'Acumulator'"):
        bigbatch.Acumulator  # noqa: B018


def test_verify_stays_function_after_submodule_import():
    code = """
import bigbatch.verification.verify
import bigbatch.batching.plan
from bigbatch.verification.verify import verify
print(bigbatch.verify is verify, type(bigbatch.plan).__name__)
"""
    assert run(code) == ["True", "function"]


def test_importing_package_loads_no_torch_or_lm_library():
    heavy = ("torch", "numpy", "rich", "pydantic", "transformers", "tokenizers", "datasets", "peft", "safetensors")
    assert run(f"import sys, bigbatch; print(*[name for name in {heavy} if name in sys.modules])") == []


def test_state_and_record_modules_import_no_torch():
    modules = "bigbatch.scaling, bigbatch.memory.limit, bigbatch.batching.plan, bigbatch.window_report, bigbatch.errors"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert run(code) == ["False"]


def test_core_loads_no_library_but_torch():
    heavy = ("rich", "pydantic", "transformers", "tokenizers", "datasets", "peft", "safetensors")
    code = f"""
import sys
from bigbatch import *
print(*[name for name in {heavy} if name in sys.modules])
print(*[name for name in sys.modules if name.startswith(("bigbatch.lm", "bigbatch.cli", "bigbatch.integrations"))])
"""
    assert run(code) == []


def test_errors_have_documented_base_classes():
    assert issubclass(bigbatch.WindowStateError, RuntimeError)
    assert issubclass(bigbatch.InputError, ValueError)
    assert issubclass(bigbatch.WindowStateError, bigbatch.BigbatchError)
    assert issubclass(bigbatch.InputError, bigbatch.BigbatchError)
