"""Move a loaded model to its device for the level of offload of a run.

model in host memory → narrow weights, everything else → device → weights that a forward reads elsewhere: float32 again
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.setup import ModelSetup
from bigbatch.offload.host_values import host_value, widen
from bigbatch.offload.model_move import move_to_device
from bigbatch.offload.weight_probe import read_elsewhere, uncast_weights
from bigbatch.preserve import preserved
from bigbatch.trials.loss_modules import modules_used_by

NUM_TOKENS = 4  # of the forward that shows how the model reads its weights


def move_model(model: Any, config: TrainConfig, device_spec: DeviceSpec) -> Any:
    """Move a model to its device; the float32 values of weights that offload will narrow stay in host memory.

    Whatever runs the model before the first window gets the same bits: a weight that a forward reads otherwise than in
    a linear layer under autocast is in float32 on the device, and so are all of them if that is not known.

    Args:
        model: As it was loaded, without adapters; changed in place.
        config: A resolved config.
        device_spec: Device and precision.

    Returns:
        The model.
    """
    if config.offload == "auto" or not starts_narrow(config, device_spec.precision):
        return model.to(device_spec.device)
    move_to_device(model, device_spec.device, offload=config.offload)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(NUM_TOKENS, device=device_spec.device)[None] % vocabulary

    def logits() -> Tensor:
        model.eval()
        with device_spec.autocast():
            found: Tensor = model(input_ids=tokens, use_cache=False).logits
        return found.float().sum()

    _widen_read_elsewhere(model, logits)
    return model


def starts_narrow(config: TrainConfig, precision: str) -> bool:
    """Return whether weights that offload narrows reach the device in bfloat16.

    Not those of adapters, which are made there, nor those of embeddings, which stay in float32 for a `Coupled`.
    """
    return precision == "bf16" and not config.lora_rank and config.objective != "embedding"


def widen_for_loss(model_setup: ModelSetup, data: Any, device: torch.device) -> None:
    """Put the float32 values of weights on the device that a loss reads otherwise than in a linear layer.

    Args:
        model_setup: The model and a loss of the user's own, which is called once if there are narrow weights.
        data: Its shortest sample is used.
        device: Of the model.
    """

    def loss() -> Tensor:
        sample = data[int(data.lengths.argmin())]
        microbatch = {name: tensor.to(device) for name, tensor in model_setup.collate([sample]).items()}
        return model_setup.loss_fn(model_setup.model, microbatch)[0]

    _widen_read_elsewhere(model_setup.model, loss, *modules_used_by(model_setup.loss_fn))


def _widen_read_elsewhere(model: Any, compute_loss: Callable[[], Tensor], *modules: nn.Module) -> None:
    narrow = {parameter for parameter in model.parameters() if host_value(parameter) is not None}
    if not narrow:
        return
    try:
        with preserved(model, *modules, parameters=False), uncast_weights(model, narrow) as uncast:
            loss = compute_loss()
            found = uncast | read_elsewhere(loss, narrow) if loss.requires_grad else narrow
    except Exception:  # noqa: BLE001 - such as of a weight whose dtype is not that of its inputs; others come again
        found = narrow
    widen(found)
