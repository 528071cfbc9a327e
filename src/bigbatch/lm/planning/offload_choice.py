"""The level of offload of ``bigbatch train --offload auto``: the one that is predicted to be the fastest that fits."""

from bigbatch.autotune.peak_prediction import PredictionError
from bigbatch.engine.card_target import local_card
from bigbatch.errors import InputError, MemoryLimitError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import check_gpu, resolve_device
from bigbatch.lm.distributed.ranks import RankContext
from bigbatch.lm.planning.data_statistics import measure_data
from bigbatch.lm.planning.device_target import PlanTarget, resolve_target
from bigbatch.lm.planning.offload_cases import OffloadCases
from bigbatch.lm.planning.offload_table import levels_of
from bigbatch.lm.training.setup import ProgressCallback
from bigbatch.memory.limit import describe_bytes
from bigbatch.offload.choice import choose, describe_seconds
from bigbatch.offload.host_memory import available_host_bytes
from bigbatch.offload.link_rate import measure_link_rate


def with_chosen_offload(
    config: TrainConfig, ranks: RankContext, *, progress: ProgressCallback
) -> tuple[TrainConfig, str | None]:
    """Return a configuration with the chosen level in place of ``auto``, and a sentence about it. Collective.

    The first rank chooses, for the slowest link to the host that a rank has measured. With a fixed micro-batch, the
    activation checkpointing is chosen too, unless it is set; with ``--microbatch auto``, training measures both.

    Raises:
        InputError: No level fits on the card and on the host, or the memory of the model cannot be predicted.
    """
    if config.offload != "auto":
        return config, None
    asked = config.resolved()
    check_gpu(asked.gpu, resolve_device(asked.device, asked.precision).device)
    target = resolve_target(asked)
    rates = ranks.all_gather(measure_link_rate(target.device) if target.device.type == "cuda" else None)
    link_rate = min((rate for rate in rates if rate is not None), default=None)
    found = ranks.broadcast(_choose(asked, target, ranks, link_rate, progress) if ranks.is_first else None)
    return config.model_copy(update=found["settings"]), found["sentence"]


def _choose(
    asked: TrainConfig, target: PlanTarget, ranks: RankContext, link_rate: float | None, progress: ProgressCallback
) -> dict[str, object]:
    """Choose on this rank; return the settings that follow, and a sentence."""
    if target.device.type != "cuda" or target.budget is None:
        sentence = f"offload none, chosen by auto: on {target.device} it saves nothing"
        return {"settings": {"offload": "none"}, "sentence": sentence}
    data = measure_data(asked, progress=progress)
    asked = asked.model_copy(update={"precision": target.device_spec.precision, "max_length": data.max_length})
    progress("choosing the level of offload")
    try:
        cases = OffloadCases(asked, target, data, num_cards=ranks.size, levels=levels_of(asked))
        host_bytes = available_host_bytes(num_processes=ranks.local_size)
        card = local_card(target.device).with_link_rate(link_rate)
        candidates = cases.candidates(target.budget.usable_bytes, card, host_bytes)
        chosen = choose(candidates, card_bytes=target.budget.usable_bytes, host_bytes=host_bytes)
    except (PredictionError, MemoryLimitError) as error:
        raise InputError(f"--offload auto: {error} Pass a level, such as --offload optimizer.") from error
    settings: dict[str, object] = {"offload": chosen.level}
    if asked.microbatch != "auto" and asked.gradient_checkpointing == "auto":
        settings["gradient_checkpointing"] = chosen.checkpointing
    card_memory, host_memory = map(describe_bytes, (chosen.card_bytes, chosen.host_bytes))
    sentence = (
        f"offload {chosen.level}, chosen by auto: {card_memory} on the card with checkpointing {chosen.checkpointing}, "
        f"{host_memory} on the host, about {describe_seconds(chosen.time.total_s)} an update"
    )
    return {"settings": settings, "sentence": sentence}
