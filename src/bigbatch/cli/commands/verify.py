"""``bigbatch verify``: compare every split of a batch with the full batch, on the model, data and loss of a run."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from bigbatch.cli.console import make_console, progress_display, quiet_libraries
from bigbatch.cli.options import VerifyOptions
from bigbatch.cli.run_lookup import check_paths
from bigbatch.cli.session import enable_determinism, sample_noun
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bigbatch.lm.model.fp8_gradient import Fp8Gradient
    from bigbatch.lm.training.setup import TrainingSetup
    from bigbatch.verification.verify import Verification

EXACT = 0
NOT_EXACT = 1
TABLE_COLUMNS = 66
NUM_ORDERS = 8  # of --order


def run(config: TrainConfig, options: VerifyOptions) -> int:
    """Print the verification; return 0 only if every split is exact, with ``--precision fp8`` within tolerance."""
    check_paths(config)
    enable_determinism(config)
    console, notes = make_console(), make_console(stderr=True)
    with progress_display(console if not options.as_json else notes if notes.is_terminal else None) as progress:
        from bigbatch.lm.model.fp8_gradient import compare_gradients
        from bigbatch.lm.training.reference import add_reference
        from bigbatch.lm.training.setup import set_up_training
        from bigbatch.offload.host_values import widen

        quiet_libraries()
        setup = set_up_training(config, progress=progress)
        widen(setup.model.parameters())  # gradients are compared in their dtype
        order = setup.order.epoch(0).part(0, options.samples).tolist()
        if len(order) < 2:
            one = f"{len(order)} {sample_noun(config)}"
            raise InputError(f"a batch of {one} cannot be split: pass --samples 2 or more, or more data.")
        progress("computing gradients")
        samples, cuts = [setup.training[i] for i in order], options.cuts or default_cuts(len(order))
        add_reference(setup, samples)
        if config.reproducible:
            return _run_reproducible(setup, samples, as_json=options.as_json)
        fp8 = compare_gradients(setup.model_setup, samples, setup.device_spec.device)
        tolerance = None if fp8 is None else fp8_tolerance(fp8)
        verification = verify_cuts(setup, samples, cuts, orders=NUM_ORDERS if options.order else 0, tolerance=tolerance)
    if options.as_json:
        subject = {"model": config.model, "data": config.data_text, "machine": str(setup.device_spec)}
        console.print_unbroken(json.dumps(subject | as_json(verification, fp8)))
    else:
        console.print(f"{config.model} on {config.data_text}, {setup.device_spec}")
        if setup.model_setup.fp8 is not None:
            console.print(setup.model_setup.fp8.note)
        for line in describe(verification, fp8, width=console.width if console.is_terminal else TABLE_COLUMNS):
            console.print(line)
    return EXACT if verification.exact else NOT_EXACT


def _run_reproducible(setup: "TrainingSetup", samples: "list[dict[str, Tensor]]", *, as_json: bool) -> int:
    """Print whether random orders of the quanta have the same bits; return 0 only if they do."""
    import torch

    from bigbatch.engine.order_check import check_orders
    from bigbatch.lm.training.engine_factory import make_training_engine
    from bigbatch.preserve import preserved

    config = setup.config
    with preserved(setup.model):
        torch.manual_seed(config.seed)
        optimizer = torch.optim.SGD([p for p in setup.model.parameters() if p.requires_grad])  # never steps
        found = check_orders(make_training_engine(setup, optimizer), samples, num_orders=NUM_ORDERS)
    console = make_console()
    if as_json:
        subject = {"model": config.model, "data": config.data_text, "machine": str(setup.device_spec)}
        console.print_unbroken(json.dumps(subject | asdict(found) | {"reproducible": not found.differing}))
    else:
        console.print(f"{config.model} on {config.data_text}, {setup.device_spec}")
        console.print(str(found))
    return EXACT if not found.differing else NOT_EXACT


def verify_cuts(
    setup: "TrainingSetup",
    samples: "list[dict[str, Tensor]]",
    cuts: Sequence[int],
    *,
    orders: int = 0,
    tolerance: float | None = None,
) -> "Verification":
    """Verify the cuts of a batch, with the loss that a run would train; by default to the tolerance of its dtype."""
    from bigbatch.lm.training.window_routing import counted_samples
    from bigbatch.verification.verify import verify

    balanced = setup.model_setup.balanced
    with counted_samples(setup.model_setup, samples, setup.device_spec.device):
        return verify(
            setup.model,
            setup.model_setup.training_loss,
            samples,
            microbatch=cuts,
            collate=setup.collate,
            count_items=None if balanced is None or balanced.scope == "global" else balanced.count_items,
            orders=orders,
            tolerance=tolerance,
        )


def fp8_tolerance(fp8: "Fp8Gradient") -> float:
    """Return the largest difference between cuts that the rounding of products in float8 explains.

    Two gradients with independent errors of relative size d, as measured against products in bfloat16, differ by √2·d;
    those of two cuts have most of their errors in common. At least the tolerance of bfloat16, in which everything else
    is computed.
    """
    import torch

    from bigbatch.verification.tolerances import TOLERANCES

    difference = 0.0 if math.isnan(fp8.cosine) else fp8.relative_difference
    return max(TOLERANCES[torch.bfloat16], math.sqrt(2) * difference)


def describe(
    verification: "Verification", fp8: "Fp8Gradient | None" = None, *, width: int = TABLE_COLUMNS
) -> Iterator[str]:
    """Yield the lines of a verification; in less than ``TABLE_COLUMNS`` columns, a line for each cut.

    With products in float8, no cut is called exact.
    """
    lines = str(verification).splitlines()
    if fp8 is not None:
        verdict = next(i for i, line in enumerate(lines) if line.startswith(("exact", "NOT exact")))
        lines[verdict : verdict + 1] = [_fp8_verdict(is_within=verification.exact), str(fp8)]
    if width >= TABLE_COLUMNS:
        yield from lines
        return
    title = next(i for i, line in enumerate(lines) if line.lstrip().startswith("micro-batch "))
    yield from lines[:title]
    for cut in verification.cuts:
        mark = "" if cut.relative_error <= verification.tolerance else ", not exact"
        yield (
            f"micro-batches of {cut.microbatch}: {cut.num_microbatches}, bigbatch {cut.relative_error:.1e}, mean of "
            f"means {cut.mean_of_means_error:.1e}{mark}"
        )
    yield from lines[title + 1 + len(verification.cuts) :]


def _fp8_verdict(*, is_within: bool) -> str:
    if is_within:
        return "not exact: the rounding of products in fp8 depends on the cut; every cut is within the tolerance"
    return "NOT exact: a cut moves the gradient by more than the tolerance"


def default_cuts(num_samples: int) -> list[int]:
    """Return the powers of two below the batch, and 3, which leaves a shorter last micro-batch."""
    sizes = {2**power for power in range(num_samples.bit_length()) if 2**power < num_samples}
    return sorted(sizes | ({3} if num_samples > 3 else set()))


def as_json(verification: "Verification", fp8: "Fp8Gradient | None" = None) -> dict[str, object]:
    """Convert a verification to JSON values: dtypes by name, NaN and infinity as null."""
    record = asdict(verification)
    if fp8 is not None:
        about = {"is_within_tolerance": verification.exact, "note": str(fp8)}
        record |= {"exact": False, "fp8": asdict(fp8) | about}
    record["dtype"] = str(verification.dtype).removeprefix("torch.")
    return {name: _finite(value) for name, value in record.items()}


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
