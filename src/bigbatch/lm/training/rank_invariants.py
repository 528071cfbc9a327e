"""What must be the same on all ranks of a run: settings, samples, tokenizer, model and versions."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch

from bigbatch import __version__
from bigbatch.lm.config.field_groups import flag_of
from bigbatch.lm.config.field_types import join_texts
from bigbatch.lm.training.resume import COMPILED
from bigbatch.lm.training.setup import TrainingSetup


def rank_invariants(setup: TrainingSetup, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same on all ranks of a run, by the name that a user knows it by.

    Args:
        setup: On this rank.
        facts: What `run_facts` returned for it.
    """
    settings = setup.config.model_dump(mode="json", exclude={"device", "out"})
    tensors = [(n, str(t.dtype), list(t.shape), t.requires_grad) for n, t in setup.model.named_parameters()]
    return {
        **{flag_of(name): join_texts(value) if isinstance(value, list) else value for name, value in settings.items()},
        "the samples": facts["data_sha256"],
        "the tokenizers": facts["vocabulary_sha256"],
        "the chat templates": facts["chat_template_sha256"],
        "the parameters of the models": sha256(json.dumps(tensors).encode()).hexdigest(),
        "the weights of the models": None if setup.weights is None else setup.weights.fingerprint(),
        "the weights that are not trained": facts["frozen_sha256"],
        "the compiled layers": facts.get(COMPILED),
        "the versions": [__version__, torch.__version__],
    }
