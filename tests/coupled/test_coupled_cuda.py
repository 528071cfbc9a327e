"""Coupled windows on a CUDA device: random states, prefetched batches, and memory that runs out."""

from typing import Any

import pytest
import torch

from coupled.models import CASES, NUM_SAMPLES, TOLERANCE, Case, batch, engine_of, gradient_error, rows_of, towers

pytestmark = pytest.mark.gpu
CLIP = CASES["clip"]


def masked_whole_batch(data: dict[str, torch.Tensor], cut: int) -> torch.nn.Module:
    """Return the gradient of the whole batch in one graph, with the masks that micro-batches of a cut draw."""
    reference = towers(dropout=0.3).cuda()
    torch.manual_seed(7)
    on_device = {name: column.cuda() for name, column in data.items()}
    parts = [CLIP.encode(reference, rows_of(on_device, slice(i, i + cut))) for i in range(0, NUM_SAMPLES, cut)]
    CLIP.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    return reference


@pytest.mark.parametrize("cut", [1, 4, 11, 22])
def test_masks_of_device_are_replayed(cut: int) -> None:
    model = towers(dropout=0.3).cuda()
    engine = engine_of(model, CLIP, cut, check=False)
    for _ in range(2):  # a batch on the host: both passes prefetch it
        torch.manual_seed(7)
        engine.backward(batch())
        assert gradient_error(model, masked_whole_batch(batch(), cut)) <= TOLERANCE


def test_out_of_memory_in_second_pass_restarts_window() -> None:
    class Large:
        """Holds memory in the second pass, above what the device has if there are more than three samples."""

        sizes: list[int] = []  # noqa: RUF012

        def __call__(self, model: Any, part: dict[str, torch.Tensor]) -> Any:
            if torch.is_grad_enabled():
                self.sizes.append(len(part["left"]))
                if len(part["left"]) > 3:
                    torch.empty(2**50, dtype=torch.uint8, device="cuda")
            return CLIP.encode(model, part)

    model, encode = towers(dropout=0.3).cuda(), Large()
    engine = engine_of(model, Case(encode, CLIP.loss), 12, check=False)
    torch.manual_seed(7)
    report = engine.backward(batch(12))
    assert report.retries == 2
    assert encode.sizes[-4:] == [3, 3, 3, 3]
    reference = towers(dropout=0.3).cuda()
    torch.manual_seed(7)
    data = {name: column.cuda() for name, column in batch(12).items()}
    parts = [CLIP.encode(reference, rows_of(data, slice(i, i + 3))) for i in range(0, 12, 3)]
    CLIP.loss(reference, tuple(torch.cat(column) for column in zip(*parts, strict=True))).backward()
    assert gradient_error(model, reference) <= TOLERANCE


def test_automatic_microbatch_is_chosen() -> None:
    model = towers().cuda()
    engine = engine_of(model, CLIP, "auto", memory="2GiB")
    assert engine.backward(batch(64)).items == 64
    assert engine.choice is not None
