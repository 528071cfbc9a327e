"""Random values that several threads draw."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from bigbatch.lm.model import from_scratch
from bigbatch.lm.model.from_scratch import new_model
from bigbatch.lm.model.parallel_fills import BLOCK, filled_in_parallel
from bigbatch.lm.model.pretrained import model_from_config

SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 96, "pad_token_id": 3},
    "gpt2": {"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 64},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "qwen3": {**SMALL, "intermediate_size": 96, "head_dim": 16},
    "gemma2": {**SMALL, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2},
    "mixtral": {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4},
    "mamba": {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 64, "state_size": 8},
}


@pytest.fixture
def no_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every model as a large one."""
    monkeypatch.setattr(from_scratch, "MOST_SERIAL", 0)


class Filled(nn.Module):
    """A parameter of several blocks, filled twice, and what was read in between."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BLOCK + 5, 2))
        nn.init.uniform_(self.weight, 5, 6)
        self.seen = float(self.weight.detach()[0, 0]) if read else None
        nn.init.normal_(self.weight, mean=1, std=0.5)
        self.register_buffer("noise", torch.randn(3))


def make(read: bool = False, seed: int = 0, num_threads: int = 3) -> Filled:
    return filled_in_parallel(lambda: Filled(read), seed, num_threads=num_threads)


def test_values_do_not_depend_on_threads_or_on_torchs_generator() -> None:
    torch.manual_seed(0)
    one = make(num_threads=1)
    torch.manual_seed(1)
    assert torch.equal(one.weight, make(num_threads=4).weight)
    assert not torch.equal(one.weight, make(seed=1).weight)


def test_values_are_of_the_last_distribution_and_blocks_differ() -> None:
    weight = make().weight.detach().flatten()
    assert abs(float(weight.mean()) - 1) < 1e-3
    assert abs(float(weight.std()) - 0.5) < 1e-3
    assert not torch.equal(weight[:1000], weight[BLOCK : BLOCK + 1000])


def test_value_that_is_read_has_been_drawn() -> None:
    module = make(read=True)
    assert module.seen is not None
    assert 5 <= module.seen < 6
    assert abs(float(module.weight.detach().mean()) - 1) < 1e-3


def test_other_random_functions_use_torchs_generator() -> None:
    torch.manual_seed(7)
    module = make()
    torch.manual_seed(7)
    assert torch.equal(module.get_buffer("noise"), torch.randn(3))


def test_fill_of_a_part_is_not_deferred() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))
            with torch.no_grad():
                self.weight.normal_()
                self.weight[2].uniform_(3, 4)

    weight = filled_in_parallel(Part, 0).weight.detach()
    assert (weight[2] >= 3).all()
    assert 0 < float(weight[[0, 1, 3]].abs().max()) < 10


def test_tensor_that_is_no_parameter_is_filled() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = [torch.full((100,), 7.0).uniform_(2, 3)]

    (held,) = filled_in_parallel(Plain, 0).held
    assert ((held >= 2) & (held <= 3)).all()


def test_tensors_of_one_shape_have_different_values() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    module = filled_in_parallel(Two, 0)
    assert not torch.equal(module.one.weight, module.other.weight)


@pytest.mark.usefixtures("no_small_models")
@pytest.mark.parametrize("model_type", CONFIGS)
def test_constants_and_distributions_of_a_model_are_those_of_one_thread(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    found = new_model(config, name=model_type, dtype=torch.float32, seed=0)
    torch.manual_seed(0)
    expected = model_from_config(config, dtype=torch.float32, device=torch.device("cpu"))
    tensors = dict(expected.state_dict()) | dict(expected.named_buffers())
    others = dict(found.state_dict()) | dict(found.named_buffers())
    assert tensors.keys() == others.keys()
    num_random = 0
    for name, tensor in tensors.items():
        assert bool(others[name].isfinite().all())
        if is_constant(name, tensor, config):
            assert torch.equal(others[name], tensor), name
        else:
            num_random += 1
            assert not torch.equal(others[name], tensor), name
            assert_alike(others[name], tensor, name)
    assert num_random >= 4


def is_constant(name: str, tensor: Tensor, config: Any) -> bool:
    """Whether a second model with another seed has the same values."""
    torch.manual_seed(1)
    again = model_from_config(config, dtype=torch.float32, device=torch.device("cpu"))
    other = (dict(again.state_dict()) | dict(again.named_buffers()))[name]
    return torch.equal(other, tensor)


def assert_alike(one: Tensor, other: Tensor, name: str) -> None:
    """Check the rows of zeros, the mean and the standard deviation, within six standard errors of both samples."""
    assert torch.equal((one == 0).all(-1), (other == 0).all(-1)), name
    error = 6 * float(other.std()) * (2 / other.numel()) ** 0.5
    assert abs(float(one.mean() - other.mean())) <= error, name
    assert abs(float(one.std() - other.std())) <= error, name


def test_weights_of_a_small_model_are_those_of_transformers_after_manual_seed() -> None:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"])
    found = new_model(config, name="llama", dtype=torch.float32, seed=3)
    torch.manual_seed(3)
    expected = model_from_config(config, dtype=torch.float32, device=torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


@pytest.mark.usefixtures("no_small_models")
def test_weights_of_a_model_do_not_depend_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama", **CONFIGS["llama"])
    first = new_model(config, name="llama", dtype=torch.float32, seed=3)
    monkeypatch.setattr("bigbatch.lm.cpu_cores.CpuCores.usable", 1)
    again = new_model(config, name="llama", dtype=torch.float32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
