"""Functions that ranks run in test_load_balancing.py."""

import torch
import torch.distributed as dist

from bigbatch.distributed.replicated import Replicated
from bigbatch.lm.training.engine_factory import make_engine
from bigbatch.lm.training.window_routing import counted_window, run_update
from support.expert_models import expert_model, expert_samples, gradients, relative_error, set_up, whole_batch

COEFFICIENT = 0.5


def gradient(first: int, scope: str) -> tuple[float, float]:
    """Return the error of the gradient, and of the loss, if rank 0 has the first samples and rank 1 the others."""
    model, samples = expert_model("qwen2"), expert_samples()
    model_setup = set_up(model, router_aux_loss=scope)
    own = samples[:first] if dist.get_rank() == 0 else samples[first:]
    optimizer = torch.optim.SGD(model_setup.model.parameters(), lr=0.0)
    engine = make_engine(model_setup, optimizer, microbatch=4, sync=Replicated(model_setup.model))
    expected, loss = whole_batch(model, samples, COEFFICIENT)
    if scope == "microbatch":
        engine.backward(own)
        return relative_error(gradients(model_setup.model), expected), 0.0
    with counted_window(engine, model_setup, own) as routing:
        engine.backward(own)
    return relative_error(gradients(model_setup.model), expected), abs(float(routing.loss) / loss - 1)


def failure(kind: str) -> tuple[str, str]:
    """Fail, or abandon, on rank 1 while the routing is counted; return the error of this rank."""
    model_setup = set_up(expert_model("mixtral"))
    optimizer = torch.optim.SGD(model_setup.model.parameters(), lr=0.0)
    engine = make_engine(model_setup, optimizer, microbatch=4, sync=Replicated(model_setup.model))
    is_second = dist.get_rank() == 1

    def fail(*_: object) -> None:
        raise ArithmeticError("a fault in a layer")

    if kind == "fail" and is_second:
        model_setup.model.model.layers[0].register_forward_pre_hook(fail)
    try:
        run_update(engine, model_setup, expert_samples(8), should_abandon=lambda: kind == "abandon" and is_second)
    except Exception as error:  # noqa: BLE001 - compared by the test
        return type(error).__name__, str(error)
    return "none", ""
