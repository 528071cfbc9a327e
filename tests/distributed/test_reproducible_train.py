"""`bigbatch train --reproducible` on one rank and on several, stopped, resumed and compared with `bigbatch diff`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.cli import main
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.model import setup
from bigbatch.lm.runs.identity import digest_of
from support.distributed_runs import RunFolder
from support.hinted_compiler import HintedCompiler, install
from support.torchrun_ranks import Launch, run


def words(out: str, *more: str) -> list[str]:
    settings = ["--data", "data.jsonl", "--model", "dropping", "--max-length", "32", "--steps", "6"]
    settings += ["--global-batch", "9", "--lr", "0.01", "--checkpoint-every", "2", "--validation-fraction", "0.15"]
    return ["train", *settings, "--device", "cpu", "--reproducible", "--out", out, *more]


@pytest.fixture
def reproducible(run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(run_folder.folder)
    return run_folder


def launch(folder: RunFolder, size: int, arguments: list[str], **how: Any) -> Launch:
    return run(arguments, size, folder=folder.folder, alone=size == 1, **how)


def model_bits(name: str) -> bytes:
    return (Path(name) / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_runs_of_any_ranks_and_micro_batch_are_equal(reproducible: RunFolder, capfd: pytest.CaptureFixture[str]):
    launch(reproducible, 1, words("same-alone", "--microbatch", "2"))
    launch(reproducible, 3, words("same-ranks", "--token-budget", "128"))
    capfd.readouterr()
    assert main(["diff", "same-alone", "same-ranks"]) == 0
    assert capfd.readouterr().out == "equal in 6 updates and 28 parameters\n"
    assert model_bits("same-alone") == model_bits("same-ranks")
    launch(reproducible, 2, words("same-resumed", "--microbatch", "4"))
    remove_after(Path("same-resumed"), 4)
    resumed = launch(reproducible, 1, ["resume", "same-resumed"])
    assert "resuming same-resumed after update 4\n" in resumed.stdout()
    assert main(["diff", "same-alone", "same-resumed"]) == 0
    assert model_bits("same-alone") == model_bits("same-resumed")


@pytest.mark.slow
def test_compiled_runs_of_any_ranks_and_micro_batch_are_equal(
    reproducible: RunFolder, capfd: pytest.CaptureFixture[str]
):
    """The results of the compiler depend on the sizes that a process sees first."""
    compiled = "--compile", "layers"
    launch(reproducible, 1, words("compiled-alone", *compiled, "--microbatch", "2"), patch=install)
    ranks = launch(reproducible, 2, words("compiled-ranks", *compiled, "--token-budget", "128"), patch=install)
    launch(reproducible, 3, words("compiled-resumed", *compiled, "--microbatch", "4"), patch=install)
    remove_after(Path("compiled-resumed"), 4)
    resumed = launch(reproducible, 2, ["resume", "compiled-resumed", "--token-budget", "64"], patch=install)
    assert "resuming compiled-resumed after update 4\n" in resumed.stdout()
    for other in ("compiled-ranks", "compiled-resumed"):
        capfd.readouterr()
        assert main(["diff", "compiled-alone", other]) == 0
        assert capfd.readouterr().out == "equal in 6 updates and 28 parameters\n"
        assert model_bits("compiled-alone") == model_bits(other)
    assert "calls of compiled layers ran eagerly: nothing was compiled for such inputs before" in ranks.stdout()
    launch(reproducible, 1, words("compiled-eager", "--microbatch", "2"))
    assert main(["diff", "compiled-alone", "compiled-eager"]) == 1, "the compiler changes bits"


def compile_on_first_rank(rank: int) -> None:
    """Compile by default, as on CUDA, and fail on all ranks but the first."""
    setup.compiles_layers = lambda *_: True  # type: ignore[assignment]
    if rank:
        torch.compile = fail  # type: ignore[assignment]
    else:
        install()


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no compiler")


def test_rank_that_cannot_compile_is_refused(reproducible: RunFolder):
    ranks = Launch(words("one-rank"), 2, folder=reproducible.folder, patch=compile_on_first_rank)
    codes = ranks.wait()
    assert codes == [2, 2], ranks.stderr() + ranks.stderr(1)
    assert "rank 1 differs from rank 0 (the compiled layers differ)" in ranks.stderr()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_runs_compiled_by_inductor_are_equal(reproducible: RunFolder):
    compiled = "--compile", "layers"
    launch(reproducible, 1, words("inductor-alone", *compiled, "--microbatch", "2"))
    launch(reproducible, 2, words("inductor-ranks", *compiled, "--token-budget", "128"))
    assert main(["diff", "inductor-alone", "inductor-ranks"]) == 0
    assert model_bits("inductor-alone") == model_bits("inductor-ranks")


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hinted(monkeypatch: pytest.MonkeyPatch) -> HintedCompiler:
    torch._dynamo.reset()
    compiler = HintedCompiler()
    monkeypatch.setattr(torch, "compile", compiler.compile)
    return compiler


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
def test_compiled_runs_of_any_micro_batch_are_equal(
    reproducible: RunFolder, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    for out, more in (
        ("compiled-small", ("--microbatch", "2")),
        ("compiled-large", ("--token-budget", "128", "--validation-every", "1")),
    ):
        compiler = hinted(monkeypatch)
        assert main(words(out, "--compile", "layers", *more)) == 0
        sizes.append(compiler.sizes)
    assert sizes[0] == sizes[1] != []
    assert main(["diff", "compiled-small", "compiled-large"]) == 0
    assert model_bits("compiled-small") == model_bits("compiled-large")


WAS_COMPILED = (
    "bigbatch resume: first-layers is reproducible and its layers were compiled, and they cannot be compiled now, "
    "which would change the bits. Leave out --compile none, resume it where they can be compiled, or start a new run.\n"
)
WAS_NOT_COMPILED = (
    "bigbatch resume: {} is reproducible and its layers were not compiled, and they are compiled now, which would "
    "change the bits. Pass --compile none, or start a new run.\n"
)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
@pytest.mark.parametrize(
    ("first", "then", "sentence"),
    [("layers", "none", WAS_COMPILED), ("none", "layers", WAS_NOT_COMPILED.format("first-none"))],
    ids=["compiled", "eager"],
)
def test_other_compilation_on_resume_is_refused(
    first: str,
    then: str,
    sentence: str,
    reproducible: RunFolder,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    hinted(monkeypatch)
    out = f"first-{first}"
    assert main(words(out, "--compile", first)) == 0
    remove_after(Path(out), 4)
    shutil.rmtree(f"{out}/model")
    capfd.readouterr()
    assert main(["resume", out, "--compile", then]) == 2
    assert capfd.readouterr().err.endswith(sentence)
    assert main(["resume", out]) == 0
    assert f"resuming {out} after update 4\n" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
def test_run_of_earlier_version_is_resumed_in_eager_mode(
    reproducible: RunFolder, one_thread: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """It did not record whether layers were compiled: they never were."""
    hinted(monkeypatch)
    assert main(words("earlier", "--compile", "none")) == 0
    for name in ("model", "checkpoints"):
        shutil.rmtree(f"earlier/{name}")
    manifest = Path("earlier/run-manifest.json")
    content = json.loads(manifest.read_text())
    assert content["facts"].pop("compiled_layers") is False
    del content["digest"]
    manifest.write_text(json.dumps({**content, "digest": digest_of(content)}))
    capfd.readouterr()
    assert main(["resume", "earlier", "--compile", "layers"]) == 2
    assert capfd.readouterr().err.endswith(WAS_NOT_COMPILED.format("earlier"))
    assert main(["resume", "earlier"]) == 0


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints after an update, as if the run had been killed before they were written."""
    checkpoints = {int(path.name.rpartition("-")[2]): path for path in (run / "checkpoints").iterdir()}
    assert step in checkpoints, "else the run begins again"
    for number, checkpoint in checkpoints.items():
        if number > step:
            shutil.rmtree(checkpoint)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_whole_quanta_in_one_order(lengths: list[int], size: int, quantum: int):
    window = list(range(len(lengths)))[::-1]
    shares = [RankContext(size, rank).shard_window(window, lengths, quantum=quantum) for rank in range(size)]
    (whole,) = (RankContext().shard_window(window, lengths, quantum=quantum),)
    assert [sample for share in shares for sample in share] == whole
    assert sorted(whole) == sorted(window)
    used = [share for share in shares if share]
    assert all(len(share) % quantum == 0 for share in used[:-1])
    if len(lengths) >= 8 * size * quantum and len(set(lengths)) == 1:
        assert max(map(len, shares)) - min(map(len, shares)) <= 2 * quantum


def test_function_writes_the_same_fingerprints(reproducible: RunFolder):
    import bigbatch.lm

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = {"data": "data.jsonl", "model": "dropping", "max_length": 32, "steps": 3, "global_batch": 9}
        settings |= {"lr": 0.01, "device": "cpu", "reproducible": True}
        for out, more in (("same-api", {"microbatch": 8}), ("same-api-2", {"token_budget": 99})):
            bigbatch.lm.train({**settings, **more, "out": out})
    finally:
        torch.set_num_threads(before)
    assert main(["diff", "same-api", "same-api-2"]) == 0
