"""Cost of reproducible updates, their bits over 50 updates, and their loss over 300, compared with the default mode.

    python benchmarks/reproducible.py [--rounds 5] [--workload w --quanta 64]
    python benchmarks/reproducible.py --options timed,pointwise [--workload w --quanta 64]
    python benchmarks/reproducible.py --bits
    python benchmarks/reproducible.py --losses

Cost: the workloads are those of `bigbatch bench`, their samples in the order in which they are generated, as training
has them, so that quanta have about as many tokens each. Both engines run equal models and the same samples in
alternation, and the default engine has micro-batches as large as the quantum, so that both run the same forwards and
backwards: the ratio is that of the medians. Both run compiled layers, and the reproducible engine once more (``eager``)
the layers as they are; with ``--compile none`` all are eager. On a CPU, times are process times of one thread, which
exclude other processes.

Options: what the compiler's fixed options cost. The reproducible engine also runs with pointwise kernels chosen by
timing (``pointwise``), and with all kernels chosen so (``timed``), whose bits may differ between processes.

Bits: small Llama and GPT-2 models with dropout, as the tests train them, in every combination of micro-batch, order and
out-of-memory error, and on 1 to 4 gloo ranks with a kill and a resume on other ranks: all must have equal parameters
after each of 50 updates.

Losses: the mean loss of the last 20 of 300 updates, for some seeds.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bigbatch
from bigbatch.compiled_modules import FIXED_OPTIONS
from bigbatch.lm.bench.bigbatch_runner import set_up
from bigbatch.lm.bench.workload import WORKLOADS, count_tokens, shift
from bigbatch.lm.model.compilation import eager_note

QUANTA = (2, 4, 8, 16)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products of matrices need it


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="w-small", choices=[*WORKLOADS])
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each engine")
    parser.add_argument("--quanta", default=",".join(map(str, QUANTA)), help="samples, separated by commas")
    parser.add_argument("--compile", choices=("layers", "none"), default="layers")
    parser.add_argument("--options", default="", help="more compiler options to compare: pointwise, timed, or both")
    parser.add_argument("--bits", action="store_true", help="compare parameters over 50 updates")
    parser.add_argument("--losses", action="store_true", help="compare losses over 300 updates")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    if options.bits:
        compare_bits()
    elif options.losses:
        compare_losses()
    else:
        quanta = [int(quantum) for quantum in options.quanta.split(",")]
        variants = [name for name in options.options.split(",") if name]
        compare_cost(options.workload, options.rounds, quanta, compiles=options.compile, variants=variants)


def options_of(variant: str) -> dict[str, Any]:
    """Return the compiler's options of a variant."""
    if variant == "pointwise":
        return {**FIXED_OPTIONS, "triton.autotune_pointwise": True}
    assert variant == "timed", f"--options {variant}: pointwise or timed"
    kept = ("triton.mix_order_reduction_non_strict_mode", "fx_graph_cache")
    return {name: FIXED_OPTIONS[name] for name in kept}


@contextmanager
def compiler_options(variant: str) -> Iterator[None]:
    """Let set-up compile with the options of a variant inside."""
    fixed = dict(FIXED_OPTIONS)
    found = options_of(variant)
    FIXED_OPTIONS.clear()
    FIXED_OPTIONS.update(found)
    try:
        yield
    finally:
        FIXED_OPTIONS.clear()
        FIXED_OPTIONS.update(fixed)


def compare_cost(name: str, rounds: int, quanta: list[int], *, compiles: str, variants: Sequence[str] = ()) -> None:
    """Time updates of both modes in alternation."""
    workload = WORKLOADS[name]
    machine = workload.device_spec()
    is_cuda = machine.device.type == "cuda"
    samples = shift(workload.make_samples())
    model = workload.make_trained_model(machine.device)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(
        f"{name} on {machine}: {len(samples)} sequences, {count_tokens(samples):,} tokens, {trained:,} trained "
        f"parameters, torch {torch.__version__}, medians of {rounds} updates"
    )
    columns = f"{'default':>11}{'reproducible':>15}{'eager':>11}{'ratio':>8}{'of eager':>10}"
    print(f"{'quantum':>8}{'tokens in it':>14}{columns}{'layers':>12}")

    def update_s(engine: bigbatch.Engine) -> float:
        clock = time.perf_counter if is_cuda else time.process_time
        start = clock()
        engine.step(samples)
        if is_cuda:
            torch.cuda.synchronize()
        return clock() - start

    plain = set_up(model, workload, compile=compiles)
    default_optimizer = _optimizer(model)
    for quantum in quanta:
        exact_model = workload.make_trained_model(machine.device)
        fixed = set_up(exact_model, workload, compile=compiles, reproducible=True, quantum=quantum)
        settings: dict[str, Any] = {"microbatch": quantum, "collate": fixed.collate, "noise": False, "check": False}
        default = bigbatch.Engine(model, default_optimizer, plain.loss_fn, **settings)
        settings |= {"reproducible": True, "quantum": quantum}
        exact = bigbatch.Engine(exact_model, _optimizer(exact_model), fixed.loss_fn, **settings)
        eager = nullcontext if fixed.layers is None else fixed.layers.eager
        ways = [(default, nullcontext), (exact, nullcontext), (exact, eager)]
        for variant in variants:
            other_model = workload.make_trained_model(machine.device)
            with compiler_options(variant):
                found = set_up(other_model, workload, compile=compiles, reproducible=True, quantum=quantum)
            engine = bigbatch.Engine(other_model, _optimizer(other_model), found.loss_fn, **settings)
            ways.append((engine, nullcontext))
        times: list[list[float]] = [[] for _ in ways]
        for round_ in range(rounds + 1):
            for number in range(len(ways)) if round_ % 2 else reversed(range(len(ways))):
                engine, context = ways[number]
                with context():
                    times[number].append(update_s(engine))
        one, other, slower, *others = (statistics.median(each[1:]) for each in times)
        tokens = count_tokens(samples) / len(samples) * quantum
        print(
            f"{quantum:>8}{tokens:>14.0f}{one:>10.3f}s{other:>14.3f}s{slower:>10.3f}s{other / one:>8.3f}"
            f"{other / slower:>10.3f}{'compiled' if fixed.has_compiled_layers else 'eager':>12}",
            flush=True,
        )
        for variant, seconds in zip(variants, others, strict=True):
            print(f"{'':>8}{variant:>14}{'':>11}{seconds:>14.3f}s{'':>11}{seconds / one:>8.3f}", flush=True)
        for note in (*fixed.notes, eager_note(fixed.layers, lambda counts: [counts])):
            if note is not None:
                print(f"{'':>8}  {note}", flush=True)
        del exact, exact_model, fixed, ways


def _optimizer(model: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, fused=True)


def compare_bits(updates: int = 50) -> None:
    """Train in every way, and count the runs whose parameters differ from the first one."""
    from support import gloo_processes
    from support.reproducible_runs import KINDS, Run, train, train_on_ranks

    ways: list[dict[str, Any]] = [{"microbatch": size} for size in (4, 8, 16)]
    ways += [{"order": 1}, {"order": 2, "microbatch": 8}, {"microbatch": 16, "fails": (3, 8, 21, 34, 55, 90, 145)}]
    print(f"parameters after each of {updates} updates, compared with quantum 2 and micro-batch 2 in one process")
    for kind, precision in KINDS:
        run = Run(kind, precision, updates=updates)
        expected = train(run)
        for way in ways:
            _print_bits(kind, precision, str(way), [train(replace(run, **way)).same(expected)])
        for size in (2, 3, 4):
            found = gloo_processes.run(train_on_ranks, size, run, timeout_s=600)
            _print_bits(kind, precision, f"{size} ranks", [each.same(expected) for each in found])
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "state"
            gloo_processes.attempt(train_on_ranks, 3, run, saved, updates // 2, timeout_s=600)
            done = torch.load(saved)["engine"]["num_steps"]
            found = gloo_processes.run(train_on_ranks, 2, run, saved, timeout_s=600)
        same = [each.same(expected.after(done)) for each in found]
        _print_bits(kind, precision, f"3 ranks, killed after update {updates // 2}, then 2 ranks", same)


def _print_bits(kind: str, precision: str, way: str, same: list[bool]) -> None:
    print(f"{kind:<6} {precision:<8} {way:<56} {'equal' if all(same) else 'DIFFERENT'}", flush=True)


def compare_losses(updates: int = 300) -> None:
    """Train in both modes."""
    from support.reproducible_runs import Run, train

    print(f"mean loss of the last 20 of {updates} updates of a small Llama with dropout")
    print(f"{'seed':>5}{'default':>12}{'reproducible':>15}")
    for seed in range(3):
        means = []
        for settings in ({"reproducible": False, "quantum": None}, {}):
            losses = train(Run(updates=updates, seed=seed), **settings).losses
            means.append(statistics.mean(losses[-20:]))
        print(f"{seed:>5}{means[0]:>12.4f}{means[1]:>15.4f}", flush=True)


if __name__ == "__main__":
    main()
