"""What ranks do in the tests of the micro-batch of a sharded model: choose it, and count the peak of real updates."""

import gc
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.tokenizer import train_tokenizer
from bigbatch.lm.planning.data_statistics import measure_data
from bigbatch.lm.planning.device_target import resolve_target
from bigbatch.lm.planning.sharded_choice import HOST, sharded_cases, with_chosen_microbatch
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from bigbatch.memory.usage import bytes_outside
from distributed.sharded_start_cases import DeviceTracker, this_rank
from support.language_models import records, write_jsonl

NO_PROGRESS = lambda *words: None  # noqa: E731
USABLE = 2**34
NUM_COUNTED = 8  # updates


def write_long_data(folder: Path) -> None:
    """Write records of several hundred tokens, so that all are cut to the same length."""
    text = " ".join(row["completion"] for row in records(60))
    write_jsonl(folder / "data.jsonl", [{"prompt": "", "completion": f"{text} {text}"} for _ in range(40)])


def save_wide_model(folder: Path) -> None:
    """Save a model whose embeddings and head are each as large as four of its layers."""
    tokenizer = train_tokenizer([row["completion"] for row in records(50)], vocabulary_size=300)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=5000, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peaks(settings: dict[str, Any]) -> tuple[int, int]:
    """Return the predicted and the highest counted bytes of this rank in an update after the first.

    Of eight updates the one with the lowest peak: that of one update in three is up to 5 % higher, with garbage
    collected or not, probably because threads free what FSDP has gathered sooner or later.
    """
    ranks = this_rank()
    with DeviceTracker() as tracker:
        trainer = Trainer(set_up_training(TrainConfig(**settings, parallel="fsdp"), ranks=ranks), ranks=ranks)
        batch = trainer.fetch(trainer.shard_window(trainer.schedule.first_window()))
        trainer.engine.step(batch)
        gc.collect()  # tensors that set-up left in reference cycles belong to no update
        counted = []
        for _ in range(NUM_COUNTED):
            tracker.peak_bytes = 0
            trainer.engine.step(batch)
            counted.append(tracker.peak_bytes)
    config = TrainConfig(**settings, parallel="fsdp").resolved()
    target, data = resolve_target(config), measure_data(config, progress=NO_PROGRESS)
    config = config.model_copy(update={"precision": target.device_spec.precision, "max_length": data.max_length})
    (candidate,) = sharded_cases(config, target, data, ranks, device_bytes=None).candidates(USABLE, HOST)
    return candidate.card_bytes, min(counted)


def choose(settings: dict[str, Any], limits: list[int], parallel: str = "fsdp") -> tuple[Any, ...]:
    """Choose on this rank, whose tensors may use so many bytes; return size, mode, peak and what stays as asked."""
    ranks = this_rank(parallel)
    memory = bytes_outside(()) + limits[ranks.rank]
    config = TrainConfig(**settings, parallel=parallel, memory=f"{memory}B")
    chosen = with_chosen_microbatch(config, ranks, progress=NO_PROGRESS)
    assert chosen.record is not None
    assert (chosen.config.microbatch, chosen.config.memory) == (None, None)
    assert chosen.asked["memory"] == config.memory
    return chosen.config.token_budget, chosen.config.gradient_checkpointing, chosen.record["peak_bytes"]
