"""Right padding without an attention mask: told of a model by trying it, and proved by its gradients."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bigbatch.lm.data.dataset import collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.padding_check import ignores_right_padding

FLOAT64 = DeviceSpec(torch.device("cpu"), "float64")
TOKENS = 64
SMALL = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
USUAL = {**SMALL, "intermediate_size": 32}
GROUPED = {**USUAL, "num_key_value_heads": 1, "head_dim": 8}
SHORT_NAMES = {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}

CAUSAL = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "llama, eager": lambda: hf.LlamaConfig(**GROUPED, attn_implementation="eager"),
    "gpt2": lambda: hf.GPT2Config(**SHORT_NAMES, **ENDS),
    "gpt2 with a padding token": lambda: hf.GPT2Config(**SHORT_NAMES, **ENDS, pad_token_id=1),
    "qwen2": lambda: hf.Qwen2Config(**USUAL, num_key_value_heads=1),
    "mistral, sliding window": lambda: hf.MistralConfig(**GROUPED, sliding_window=6),
    "gemma2, sliding window": lambda: hf.Gemma2Config(**GROUPED, sliding_window=6),
    "opt": lambda: hf.OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=32, max_position_embeddings=64),
    "bloom, alibi": lambda: hf.BloomConfig(vocab_size=TOKENS, hidden_size=16, n_layer=2, n_head=2),
    "falcon": lambda: hf.FalconConfig(**SMALL),
    "falcon, alibi": lambda: hf.FalconConfig(**SMALL, alibi=True),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**USUAL),
    "gpt-j": lambda: hf.GPTJConfig(**SHORT_NAMES, rotary_dim=4, **ENDS),  # attention in float32 always
    "mamba": lambda: hf.MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4),
    "mixtral, router loss": lambda: hf.MixtralConfig(
        **GROUPED, num_local_experts=4, output_router_logits=True, experts_implementation="eager"
    ),
    "bert as a decoder": lambda: hf.BertConfig(**USUAL, is_decoder=True),
}
NOT_CAUSAL = {
    "bert": lambda: hf.BertConfig(**USUAL),
    "xlnet": lambda: hf.XLNetConfig(vocab_size=TOKENS, d_model=16, n_layer=2, n_head=2, d_inner=32),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """No warnings of transformers about kernels that are not installed, or about a BERT that is no decoder."""
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()
    yield
    hf.logging.set_verbosity(before)


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).double()


def ragged() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, TOKENS, (length + 1,), generator=generator) for length in (9, 8, 13)]
    return collate([{"input_ids": row[:-1], "labels": row[1:]} for row in rows], pad_id=1)


def gradients(model: Any, *, needs_mask: bool) -> list[Tensor]:
    loss_sum, _ = CausalLMLoss(FLOAT64, needs_mask=needs_mask)(model.eval(), ragged())
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss_sum, trained, allow_unused=True, materialize_grads=True))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    squares = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
    return float((squares / sum(b.square().sum() for b in expected)).sqrt())


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_model_without_mask_has_same_gradient(name: str) -> None:
    model = build(CAUSAL[name]())
    assert ignores_right_padding(model, FLOAT64)
    assert difference(gradients(model, needs_mask=False), gradients(model, needs_mask=True)) <= 1e-12


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_non_causal_model_without_mask_has_other_gradient(name: str) -> None:
    model = build(NOT_CAUSAL[name]())
    assert not ignores_right_padding(model, FLOAT64)
    assert difference(gradients(model, needs_mask=False), gradients(model, needs_mask=True)) > 1e-4


def test_adapters_do_not_affect_check() -> None:
    model = add_lora(build(CAUSAL["llama"]()), rank=2, alpha=4, seed=0).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert ignores_right_padding(model, FLOAT64)
    assert difference(gradients(model, needs_mask=False), gradients(model, needs_mask=True)) <= 1e-12


@pytest.mark.parametrize("precision", ["float32", "bf16", "bf16-weights", "fp16"])
def test_causality_is_detected_in_every_precision(precision: str) -> None:
    machine = DeviceSpec(torch.device("cpu"), precision)
    causal, looking_ahead = (
        build(config()).to(machine.weights_dtype) for config in (CAUSAL["llama"], NOT_CAUSAL["bert"])
    )
    assert ignores_right_padding(causal, machine)
    assert not ignores_right_padding(looking_ahead, machine)


def test_check_restores_random_state_and_training_modes() -> None:
    model = build(hf.GPT2Config(**SHORT_NAMES, **ENDS, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)).train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    assert ignores_right_padding(model, FLOAT64)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes


class Toy(nn.Module):
    """A language model of one mixing layer: what a position sees is the mean over those that ``sees`` allows."""

    def __init__(self, sees: Any, tokens: int = TOKENS, positions: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sees = sees
        self.embedding = nn.Embedding(tokens, 8)
        self.head = nn.Linear(8, tokens, bias=False)
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()), persistent=False)
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        self.calls += 1
        self.last = torch.rand(())
        places = torch.arange(input_ids.shape[1])
        seen = self.sees(places[:, None], places[None, :]).double()
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.head(hidden + (seen / seen.sum(-1, keepdim=True).clamp(min=1)) @ hidden))


@pytest.mark.parametrize(
    ("sees", "expected"),
    [
        (lambda query, key: key <= query, True),
        (lambda query, key: (key <= query) & (key >= query - 2), True),
        (lambda query, key: key <= query + 1, False),  # the last token sees the filling
        (lambda query, key: key == key.max() - query, False),
        (lambda query, key: key < key.max() // 2, False),  # no filling is seen, but the length is
        (lambda query, key: key == query, False),  # no token sees another: it cannot be told
    ],
)
def test_visible_positions_decide(sees: Any, expected: bool) -> None:
    assert ignores_right_padding(Toy(sees), FLOAT64) is expected


def causal(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def test_buffers_and_random_states_are_restored() -> None:
    model = Toy(causal)
    calls, last, state = model.calls, model.last, torch.get_rng_state()
    assert ignores_right_padding(model, FLOAT64)
    assert model.calls is calls
    assert model.calls == 0
    assert model.last is last
    assert model.last == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_zero_output_model_is_undecidable() -> None:
    model = Toy(causal)
    nn.init.zeros_(model.head.weight)
    assert not ignores_right_padding(model, FLOAT64)


def test_mask_requiring_or_too_small_model_keeps_mask() -> None:
    class Wanting(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
            raise AssertionError("not reached")

    model = Wanting(causal).train()
    assert not ignores_right_padding(model, FLOAT64)
    assert model.training
    assert not ignores_right_padding(Toy(causal, positions=11), FLOAT64)
    assert ignores_right_padding(Toy(causal, positions=12), FLOAT64)
    assert not ignores_right_padding(Toy(causal, tokens=8), FLOAT64)
    assert ignores_right_padding(Toy(causal, tokens=9), FLOAT64)
    assert not ignores_right_padding(nn.Linear(3, 3), FLOAT64)


def test_token_id_is_not_mistaken_for_position() -> None:
    model = Toy(causal)
    model.config.pad_token_id = 5
    assert ignores_right_padding(model, FLOAT64)


def test_mask_is_passed_only_where_needed() -> None:
    given: list[bool] = []

    def model(input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = True) -> SimpleNamespace:
        given.append(attention_mask is not None)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, TOKENS))

    for needs_mask in (True, False):
        CausalLMLoss(FLOAT64, needs_mask=needs_mask)(model, ragged())  # type: ignore[arg-type]
    assert given == [True, False]
