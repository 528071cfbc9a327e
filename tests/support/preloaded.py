"""What the server of forks imports once, so that no forked rank or command imports it again: see `gloo_processes`.

Names that are not installed are left out: the integrations are tested without the libraries of the trainer.
"""

import gc
import importlib
import os
from contextlib import suppress

import torch

NAMES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.profiler",
    "bigbatch.engine.engine",
    "bigbatch.distributed.sharded",
    "bigbatch.cli.arguments",
    "bigbatch.cli.commands.resume",
    "bigbatch.cli.commands.train",
    "bigbatch.lm.distributed.rendezvous",
    "bigbatch.lm.planning.offload_table",
    "bigbatch.lm.training.chat_detection",
    "bigbatch.lm.training.trainer",
    "bigbatch.offload.choice",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "peft",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "pytest",
    "support.rank_faults",
    "support.short_samples",
)

gc.disable()
for _name in NAMES:
    with suppress(ImportError):
        importlib.import_module(_name)

with suppress(ImportError):  # compiles 900 patterns, once per process
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")

gc.enable()
gc.collect()
gc.freeze()  # a collection in a fork then visits, and copies, only what the fork has made: 1 ms instead of 200 ms

# torch replaces its pool of threads in the first parallel operation after a fork. Where several threads begin with
# one, as those that load a model do, all but the first can find none: "Invalid thread pool!" (1,245 of 1,500 forks).
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))
