"""Move a model to its device, without the float32 values of the weights that offload keeps in host memory.

weights of linear layers → bfloat16 → device, their `HostValue` stays;    everything else → device
"""

import torch
from torch import Tensor, nn

from bigbatch.offload.host_values import HostValue, host_value, keep, mark
from bigbatch.offload.levels import Offload, check_level, reaches
from bigbatch.offload.narrow_weights import find_narrow_weights
from bigbatch.offload.transfers import Transfers, make_transfers


def move_to_device(model: nn.Module, device: torch.device | str, *, offload: Offload) -> nn.Module:
    """Move a model to a device, without the float32 values of the weights that a level of offload keeps in host memory.

        model = bigbatch.move_to_device(model, "cuda", offload="master")        # instead of model.to("cuda")
        engine = bigbatch.Engine(model, optimizer, loss_fn, offload="master")

    From level ``"master"`` on, the trained float32 weights of linear layers are rounded to bfloat16 on the host and
    copied to the device in 2 bytes each, and their float32 values stay in host memory. Before its first window, an
    engine of such a level moves them to pinned memory, a few weights at a time; those that it keeps in float32, such as
    frozen ones, it puts on the device. An engine of a lower level puts all of them there. The updates have the same
    bits as after ``model.to(device)``.

    Args:
        model: Changed in place, as by ``model.to``, with the weights that training starts from, over several ranks the
            same on each. Do not copy it, or save it other than by an engine, from here on: its weights are rounded.
        device: On which the model is trained.
        offload: The level of the engine.

    Returns:
        The model.

    Raises:
        InputError: The level does not exist.
    """
    device = torch.device(device)
    if reaches(check_level(offload), "master"):
        transfers = make_transfers(device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for weight, name in find_narrow_weights(model, trained).items():
            if not weight.is_meta and host_value(weight) is None:
                _narrow(weight, name, transfers)
    return model.to(device)


@torch.no_grad()
def _narrow(weight: Tensor, name: str, transfers: Transfers) -> None:
    # A copy: that of a loader may be in a mapped file, which counts as free memory, or is not freed alone.
    value = weight.data.to("cpu", copy=True)
    rounded = value.to(torch.bfloat16)
    narrow = torch.empty_like(rounded, device=transfers.device)
    transfers.wait(transfers.to_device(narrow, rounded, after=[transfers.computed()]))  # ``rounded`` is freed
    weight.data = narrow
    keep(weight, HostValue(value, mark(weight), name))
