"""Set-up of a model on the meta device: trials on a stand-in, adapters on the CPU, the same layers compiled.

stand-in → `set_up_model` → its attention, loss, layout and compilation → the model on the meta device
"""

from dataclasses import replace
from functools import partial
from typing import Any

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import set_magnitudes, set_trained_copies
from bigbatch.lm.model.expert_balance import use_float64_experts
from bigbatch.lm.model.meta_model import with_adapters_on_cpu
from bigbatch.lm.model.setup import ModelSetup, layers_of, set_up_model, with_lora
from bigbatch.lm.model.stand_in import stand_in
from bigbatch.lm.model.weights import Weights


def set_up_meta_model(
    model: Any, weights: Weights, config: TrainConfig, device_spec: DeviceSpec, *, pad_id: int, longest: int
) -> ModelSetup:
    """Do what `set_up_model` does for a model that is on the meta device until it is sharded.

    A `stand_in` of the model is tried in its place. What the trials find out is a matter of its code, not of its
    weights; they read weights outside of forwards and differentiate by the embedded tokens alone, which FSDP cannot
    do; and of a sharded model every trial would be collective, so that an error on one rank would leave the others
    waiting.

    Args:
        model: With parameters on the meta device, without adapters.
        weights: Of the model; renamed to the names that they have under adapters.
        config: As for `set_up_model`.
        device_spec: As for `set_up_model`.
        pad_id: As for `set_up_model`.
        longest: As for `set_up_model`.

    Raises:
        InputError: As `set_up_model` raises it.
    """
    trial = stand_in(model.config, dtype=device_spec.weights_dtype, device=device_spec.device)
    tried = set_up_model(trial, config, device_spec, pad_id=pad_id, longest=longest)
    if device_spec.precision == "float64":
        use_float64_experts(model)
    implementation = tried.model.config._attn_implementation
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
    if config.lora_rank:
        model = with_lora_on_meta(model, weights, config)
    layers = layers_of(model.train(), config)
    notes = tried.notes
    if layers is not None and tried.layers is not None and tried.layers.is_compiled:
        if tried.balanced is None:
            layers.compile(kernels="untimed" if config.deterministic else "timed")
        else:  # transformers installs the hooks of its router logits in the first forward, when layers are sharded
            notes = (*notes, "layers are not compiled: those of a sharded model do not record the use of its experts")
    return replace(tried, model=model, layers=layers, notes=notes)


def with_lora_on_meta(model: Any, weights: Weights, config: TrainConfig) -> Any:
    """Add the LoRA adapters of a config to a model on the meta device, and rename its weights accordingly.

    Raises:
        InputError: The model does not support them.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    model = with_adapters_on_cpu(model, partial(with_lora, config=config))
    weights.rename({name: names[p] for name, p in model.named_parameters() if p in names})
    read = {p: partial(weights.read_whole, name) for name, p in model.named_parameters()}
    if config.dora:
        set_magnitudes(model, read)
    set_trained_copies(model, read)
    return model
