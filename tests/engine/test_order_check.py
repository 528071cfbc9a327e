"""Random orders of quanta: the same bits for a model with dropout, others for one that keeps state."""

import torch
from torch import Tensor, nn

import bigbatch
from bigbatch.engine.order_check import check_orders


class Counter(nn.Module):
    """Depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return inputs * (1 + self.calls % 3)


def check(module: nn.Module) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), module, nn.Linear(8, 1))
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters()),
        lambda model, rows: (model(rows).square().sum(), len(rows)),
        microbatch=2,
        reproducible=True,
        quantum=2,
        check=False,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = check_orders(engine, torch.randn(11, 4), num_orders=3)
    assert all(map(torch.equal, before, model.parameters()))
    return str(found)


def test_dropout_is_the_same_bits_in_every_order():
    assert check(nn.Dropout(0.5)) == "gradient of 11 samples in quanta of 2: the same bits in 3 random orders"


def test_state_between_quanta_is_found():
    assert check(Counter()) == (
        "gradient of 11 samples in quanta of 2: NOT reproducible, 4 parameters depend on the order of the quanta, such "
        "as 0.weight: a module keeps state between micro-batches, or a kernel is not deterministic"
    )
