"""Settings of every test: one thread per process, no access to the hub, no progress bars."""

import gc
import importlib.util
import os
import shutil
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "120")
# Kernels of products on the CPU, which oneDNN keeps for 1,024 shapes by default: over 100 MiB for one file of tests.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import tempfile
from collections.abc import Generator, Iterator

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bigbatch-tests-")  # the token cache of all tests
# Kernels are shared by the processes of one run only: a run that is killed can leave half a file, which fails later.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.environ["XDG_CACHE_HOME"] + "/kernels")
# Inductor would load torch in a process for each kind of vector instructions, to see whether the compiler knows it:
# 10 s of CPU time in each process of the tests. With a compiler older than the CPU, set it to 0.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in the process itself: others would load torch, too

import pytest

from support import cpu_times, tiers
from support.process_pool import Pool, Pools

COLLECTED_S = pytest.StashKey[float]()
NUM_FROZEN = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make slowest` and `make quick`."""
    cpu_times.add_option(parser)
    parser.addoption("--stop-after", type=float, metavar="S", help="start no test later than this after collection")


def pytest_configure(config: pytest.Config) -> None:
    """Count the slow tests that are left out; measure the CPU seconds of the tests if asked to."""
    if importlib.util.find_spec("torchao") is not None:
        with warnings.catch_warnings():  # its source warns when Python first compiles it, and transformers imports it
            warnings.simplefilter("ignore")
            importlib.import_module("torchao")
    if config.getoption("markexpr") == "not slow":
        config.pluginmanager.register(tiers.LeftOut())
    if number := config.getoption("--cpu-times"):
        config.pluginmanager.register(cpu_times.CpuTimes(number))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests without garbage collections, which found next to nothing in a third of the CPU time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to count the time of ``--stop-after``."""
    session.config.stash[COLLECTED_S] = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests that would start after the time is over."""
    limit_s = item.config.getoption("--stop-after")
    if limit_s is not None and time.monotonic() - item.config.stash[COLLECTED_S] > limit_s:
        pytest.skip("not run: the time is over; make test-all runs every test")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip what torch.compile would compile for the CPU where there is no compiler of C++."""
    try:
        return (yield)
    except Exception as error:
        if shutil.which("g++") is None and "No working C++ compiler found" in str(error):
            pytest.skip("g++ is not installed, which torch.compile needs for the CPU")
        raise


def pytest_unconfigure() -> None:
    """Remove the caches of the tests."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where CUDA is missing."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


@pytest.fixture(scope="module", autouse=True)
def _collect_only_what_tests_make() -> None:
    """Running out of memory collects garbage: without the objects of imports in 1 ms, with them in 200 ms or more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _collect_no_later_imports(request: pytest.FixtureRequest) -> None:
    """The first optimizer of a process imports torch._dynamo within a test, and with it 800 modules: frozen as well."""
    stash = request.config.stash
    if len(sys.modules) > stash.get(NUM_FROZEN, 0) + 50:
        stash[NUM_FROZEN] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Return a function that returns the pool of a number of ranks; one pool per size and session."""
    made: dict[int, Pool] = {}

    def pool_of(size: int) -> Pool:
        if size not in made:
            made[size] = Pool(size)
        return made[size]

    yield pool_of
    for pool in made.values():
        pool.close()
