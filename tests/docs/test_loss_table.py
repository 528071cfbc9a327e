"""The table of docs/how-to/own-loop.md: each sum divided by its count is the mean in the same row."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.doc_pages import ROOT

PAGE = ROOT / "docs/how-to/own-loop.md"
torch.manual_seed(0)
LOGITS, LABELS = torch.randn(12, 4, dtype=torch.float64), torch.randint(4, (12,))
MASKED = torch.where(torch.arange(12) % 3 == 0, -100, LABELS)
W = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
X, Y = torch.randn(12, 3, dtype=torch.float64), torch.rand(12, 3, dtype=torch.float64)
MASK = (torch.arange(12) % 3 > 0).double()

ROWS: dict[str, tuple[Callable[[str], Tensor], int | Tensor]] = {
    "`labels.numel()`": (lambda r: F.cross_entropy(LOGITS, LABELS, reduction=r), LABELS.numel()),
    "`(labels != -100).sum()`": (lambda r: F.cross_entropy(LOGITS, MASKED, reduction=r), (MASKED != -100).sum()),
    "as without": (
        lambda r: F.cross_entropy(LOGITS, MASKED, label_smoothing=0.1, reduction=r),
        (MASKED != -100).sum(),
    ),
    "`w[labels].sum()`": (lambda r: F.cross_entropy(LOGITS, LABELS, weight=W, reduction=r), W[LABELS].sum()),
    "`w[labels[labels != -100]].sum()`": (
        lambda r: F.cross_entropy(LOGITS, MASKED, weight=W, reduction=r),
        W[MASKED[MASKED != -100]].sum(),
    ),
    "`x.numel()`": (
        lambda r: F.binary_cross_entropy_with_logits(X, Y, pos_weight=W[:3], reduction=r),
        X.numel(),
    ),
    "number of elements of the prediction": (lambda r: F.huber_loss(X, Y, reduction=r), X.numel()),
}


@pytest.mark.parametrize("count", ROWS)
def test_sum_by_count_is_mean(count: str) -> None:
    assert count in PAGE.read_text(encoding="utf-8")
    loss, number = ROWS[count]
    torch.testing.assert_close(loss("sum") / number, loss("mean"), rtol=1e-12, atol=0)


def test_batchmean_divides_by_samples() -> None:
    assert '| `kl_div(..., reduction="batchmean")` | `reduction="sum"` | samples |' in PAGE.read_text(encoding="utf-8")
    found, target = X.log_softmax(-1), Y.softmax(-1)
    mean = F.kl_div(found, target, reduction="batchmean")
    torch.testing.assert_close(F.kl_div(found, target, reduction="sum") / len(X), mean, rtol=1e-12, atol=0)
