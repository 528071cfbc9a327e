"""The language-model loss without logits: for every model the sums and gradients of that with them, in less memory."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import bigbatch
from bigbatch.autotune.peak_prediction import PeakPredictor, Prediction
from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.adapters import add_lora
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss, chunked_loss_is_exact, find_lm_head
from support.tiers import slow_except

CPU = torch.device("cpu")
FLOAT64 = DeviceSpec(CPU, "float64")
PRECISIONS = ("float32", "bf16", "bf16-weights", "fp16")
TOKENS = 64
SMALL = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
USUAL = {**SMALL, "intermediate_size": 32}
GROUPED = {**USUAL, "num_key_value_heads": 1, "head_dim": 8}
SHORT_NAMES = {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
EXPERTS = {"num_local_experts": 4, "experts_implementation": "eager"}

KNOWN = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "llama, tied": lambda: hf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2, tied": lambda: hf.Qwen2Config(**USUAL, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED),
    "gpt2": lambda: hf.GPT2Config(**SHORT_NAMES, **ENDS),
    "gpt-j, bias": lambda: hf.GPTJConfig(**SHORT_NAMES, rotary_dim=4, **ENDS),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**USUAL),
    "mistral": lambda: hf.MistralConfig(**GROUPED),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, **EXPERTS, output_router_logits=True),
    "gemma": lambda: hf.GemmaConfig(**GROUPED),
    "gemma2, soft cap": lambda: hf.Gemma2Config(**GROUPED, final_logit_softcapping=0.5),
    "gemma3, soft cap": lambda: hf.Gemma3TextConfig(**GROUPED, final_logit_softcapping=0.5),
    "recurrent gemma, soft cap": lambda: hf.RecurrentGemmaConfig(
        **{**GROUPED, "num_hidden_layers": 3}, lru_width=16, logits_soft_cap=0.5
    ),
    "granite, divided": lambda: hf.GraniteConfig(**USUAL, logits_scaling=0.2, tie_word_embeddings=True),
    "granite with experts": lambda: hf.GraniteMoeConfig(**USUAL, **EXPERTS, logits_scaling=0.2),
    "cohere, scaled": lambda: hf.CohereConfig(**USUAL, logit_scale=3.0, **ENDS),
    "cohere2, scaled": lambda: hf.Cohere2Config(**USUAL, logit_scale=3.0, **ENDS),
    "falcon-h1, scaled": lambda: hf.FalconH1Config(
        **USUAL, num_key_value_heads=1, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, lm_head_multiplier=3.0
    ),
    "opt": lambda: hf.OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=32, max_position_embeddings=64),
    "opt, projected": lambda: hf.OPTConfig(**SMALL, word_embed_proj_dim=8, ffn_dim=32, max_position_embeddings=64),
    "bloom": lambda: hf.BloomConfig(vocab_size=TOKENS, hidden_size=16, n_layer=2, n_head=2),
    "falcon": lambda: hf.FalconConfig(**SMALL),
    "phi, bias": lambda: hf.PhiConfig(**USUAL),
    "phi3": lambda: hf.Phi3Config(**USUAL, num_key_value_heads=1, **ENDS),
    "olmo2": lambda: hf.Olmo2Config(**USUAL, **ENDS),
    "stablelm": lambda: hf.StableLmConfig(**USUAL, num_key_value_heads=1),
    "starcoder2": lambda: hf.Starcoder2Config(**USUAL, num_key_value_heads=1),
    "smollm3": lambda: hf.SmolLM3Config(**USUAL, num_key_value_heads=1, **ENDS),
    "mpt": lambda: hf.MptConfig(vocab_size=TOKENS, d_model=16, n_heads=2, n_layers=2),
    "bert as a decoder, bias": lambda: hf.BertConfig(**USUAL, is_decoder=True),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No warnings of transformers about kernels that are not installed."""
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()
    yield
    hf.logging.set_verbosity(before)


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide one that is left out
    return model


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, TOKENS, (length + 1,), generator=generator) for length in (9, 8, 13)]
    ragged = [{"input_ids": row[:-1], "labels": row[1:].clone()} for row in rows]
    ragged[0]["labels"][:3] = IGNORED
    return ragged


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return collate(rows, pad_id=1)


def loss_and_gradients(model: Any, loss_fn: Any) -> list[Tensor]:
    loss_sum, items = loss_fn(model, collated(samples()))
    assert items == 9 + 8 + 13 - 3
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss_sum.detach(), *torch.autograd.grad(loss_sum, trained, allow_unused=True, materialize_grads=True)]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The larger relative error, of the loss and of the whole gradient."""
    loss = abs(found[0] - expected[0]) / expected[0]
    squares = sum((a - b).square().sum() for a, b in zip(found[1:], expected[1:], strict=True))
    return float(torch.maximum(loss, (squares / sum(b.square().sum() for b in expected[1:])).sqrt()))


@pytest.mark.parametrize("name", KNOWN)
def test_loss_and_gradients_equal_full_logits(name: str) -> None:
    model = build(KNOWN[name]())
    assert chunked_loss_is_exact(model, FLOAT64)
    chunked = loss_and_gradients(model, ChunkedCausalLMLoss(FLOAT64, chunk_tokens=5))
    assert difference(chunked, loss_and_gradients(model, CausalLMLoss(FLOAT64))) <= 1e-12


def test_unneeded_mask_is_not_passed() -> None:
    model = build(KNOWN["llama"]())
    use_causal_attention(model)
    chunked = loss_and_gradients(model, ChunkedCausalLMLoss(FLOAT64, needs_mask=False))
    assert difference(chunked, loss_and_gradients(model, CausalLMLoss(FLOAT64, needs_mask=False))) <= 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2, tied"])
def test_adapters_below_head_train_and_head_stays_frozen(name: str) -> None:
    model = add_lora(build(KNOWN[name]()), rank=2, alpha=4, seed=0).double()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    head = find_lm_head(model)
    assert head is not None
    assert not head.linear.weight.requires_grad
    assert chunked_loss_is_exact(model, FLOAT64)
    chunked = loss_and_gradients(model, ChunkedCausalLMLoss(FLOAT64, chunk_tokens=5))
    assert difference(chunked, loss_and_gradients(model, CausalLMLoss(FLOAT64))) <= 1e-12


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapted_head_is_not_supported(options: dict[str, Any]) -> None:
    import peft

    warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers, about names of theirs
    model = peft.get_peft_model(
        build(KNOWN["llama"]()), peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options})
    )
    assert find_lm_head(model) is None
    assert not chunked_loss_is_exact(model, FLOAT64)
    with pytest.raises(ValueError, match="use CausalLMLoss"):
        ChunkedCausalLMLoss(FLOAT64)(model, collated(samples()))


class Changed(hf.LlamaForCausalLM):
    """A model that does to its logits what its configuration does not tell."""

    how: Any = staticmethod(lambda logits: logits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.how(outputs.logits)
        return outputs


class CalledTwice(hf.LlamaForCausalLM):
    """A model with a second look at its head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.lm_head(self.model(kwargs["input_ids"]).last_hidden_state)
        return super().forward(*args, **kwargs)


CHANGES = {
    "scaled": lambda logits: 1.1 * logits,
    "soft cap": lambda logits: 30 * torch.tanh(logits / 30),
    "clamped": lambda logits: logits.clamp(-100, 100),
    "a bias": lambda logits: logits + torch.linspace(0, 1, TOKENS),
    "a temperature below one logit": lambda logits: torch.cat([logits[..., :1], logits[..., 1:] / 2], -1),
}


class TestExactness:
    """`chunked_loss_is_exact`, which decides."""

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("precision", ["float64", *PRECISIONS])
    def test_model_that_modifies_logits_is_unchanged(self, change: str, precision: str) -> None:
        machine = DeviceSpec(CPU, precision)
        torch.manual_seed(0)
        model = Changed(hf.LlamaConfig(**GROUPED)).to(machine.weights_dtype)
        assert chunked_loss_is_exact(model, machine)
        model.how = CHANGES[change]
        assert not chunked_loss_is_exact(model, machine)

    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, soft cap", "granite, divided", "phi, bias"])
    def test_head_is_recognised_in_every_precision(self, name: str, precision: str) -> None:
        machine = DeviceSpec(CPU, precision)
        assert chunked_loss_is_exact(build(KNOWN[name]()).to(machine.weights_dtype), machine)

    def test_head_called_twice_is_not_supported(self) -> None:
        model = CalledTwice(hf.LlamaConfig(**GROUPED)).double()
        assert not chunked_loss_is_exact(model, FLOAT64)
        with pytest.raises(ValueError, match="called its head with"):
            ChunkedCausalLMLoss(FLOAT64)(model, collated(samples()))

    def test_non_language_model_has_no_head(self) -> None:
        assert find_lm_head(nn.Linear(2, 2)) is None
        assert not chunked_loss_is_exact(nn.Linear(2, 2), FLOAT64)

    def test_model_with_too_few_positions_is_not_tried(self) -> None:
        model = build(hf.GPT2Config(**SHORT_NAMES, **ENDS, n_positions=5))
        assert not chunked_loss_is_exact(model, FLOAT64)

    def test_model_is_unchanged(self) -> None:
        model = build(hf.GPT2Config(**SHORT_NAMES, **ENDS, resid_pdrop=0.5)).train()
        model.transformer.h[0].eval()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        assert chunked_loss_is_exact(model, FLOAT64)
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_head_is_restored_after_error() -> None:
    model = build(KNOWN["llama"]())
    model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ChunkedCausalLMLoss(FLOAT64)(model, collated(samples()))
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_engine_makes_same_update(checkpointing: bool) -> None:
    """Tied weights, dropout, activation checkpoints and micro-batches of other sizes."""
    updated = []
    for loss_fn in (CausalLMLoss(FLOAT64), ChunkedCausalLMLoss(FLOAT64, chunk_tokens=7)):
        model = build(hf.GPT2Config(**SHORT_NAMES, **ENDS)).train(checkpointing)
        if checkpointing:
            warnings.simplefilter("ignore", FutureWarning)  # about the name
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = bigbatch.Engine(
            model, optimizer, loss_fn, microbatch=2, collate=collated, max_grad_norm=1.0, check=False
        )
        torch.manual_seed(3)
        reports = [engine.step(samples()) for _ in range(3)]
        updated.append([*(torch.tensor(report.loss) for report in reports), *model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*updated, strict=True))


def test_every_cut_of_batch_gives_its_gradient() -> None:
    model = build(KNOWN["gpt2"]())
    loss_fn = ChunkedCausalLMLoss(FLOAT64, chunk_tokens=5)
    assert bigbatch.verify(model, loss_fn, samples() * 2, collate=collated).exact


def test_evaluation_builds_no_graph() -> None:
    model = build(KNOWN["llama"]())
    with torch.no_grad():
        loss_sum, _ = ChunkedCausalLMLoss(FLOAT64)(model, collated(samples()))
    assert not loss_sum.requires_grad
    assert torch.allclose(loss_sum, CausalLMLoss(FLOAT64)(model, collated(samples()))[0], rtol=1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_equals_full_logits(precision: str) -> None:
    machine = DeviceSpec(CPU, precision)
    exact = loss_and_gradients(build(KNOWN["llama, tied"]()), CausalLMLoss(FLOAT64))
    model = build(KNOWN["llama, tied"]()).to(machine.weights_dtype)
    chunked, full = (
        loss_and_gradients(model, loss_fn)
        for loss_fn in (ChunkedCausalLMLoss(machine, chunk_tokens=5), CausalLMLoss(machine))
    )
    assert chunked[0].dtype == full[0].dtype == torch.float32
    assert [gradient.dtype for gradient in chunked] == [gradient.dtype for gradient in full]
    assert difference(chunked, exact) <= 1.5 * difference(full, exact) + torch.finfo(torch.float32).eps


def test_products_use_autocast_dtype() -> None:
    model = build(KNOWN["llama"]()).float()
    single, full, chunked = (
        loss_fn(model, collated(samples()))[0].item()
        for loss_fn in (
            ChunkedCausalLMLoss(DeviceSpec(CPU, "float32")),
            CausalLMLoss(DeviceSpec(CPU, "bf16")),
            ChunkedCausalLMLoss(DeviceSpec(CPU, "bf16")),
        )
    )
    assert abs(chunked - full) <= 4 * torch.finfo(torch.float32).eps * full < abs(single - full)


class TestPrediction:
    """Memory of a step with a vocabulary of 50,000, predicted without data."""

    VOCABULARY, ROWS, LENGTH, WIDTH, CHUNK = 50_000, 4, 512, 64, 256

    def predict(self, loss_fn: Any, machine: DeviceSpec, *, device: str = "cpu", lora: bool = False) -> Prediction:
        with torch.device("meta"):
            config = hf.LlamaConfig(**{**USUAL, "hidden_size": self.WIDTH, "vocab_size": self.VOCABULARY})
            model = hf.AutoModelForCausalLM.from_config(config, dtype=machine.weights_dtype).train()
        use_causal_attention(model)
        if lora:
            model = add_lora(model, rank=2, alpha=4, seed=0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ids = torch.empty(self.ROWS, self.LENGTH, dtype=torch.int64, device="meta")
        rehearsal = PeakPredictor.from_training(model, torch.optim.AdamW(trained), loss_fn, device=torch.device(device))
        return rehearsal.predict({"input_ids": ids, "labels": ids})

    @pytest.mark.parametrize("precision", slow_except(PRECISIONS, "float32", "bf16"))
    @pytest.mark.parametrize("lora", [False, True])
    def test_loss_holds_one_chunk_of_logits(self, precision: str, lora: bool) -> None:
        machine = DeviceSpec(CPU, precision)
        logits = self.ROWS * self.LENGTH * self.VOCABULARY
        full = self.predict(CausalLMLoss(machine, needs_mask=False), machine, lora=lora)
        assert full.parts["loss"] >= 10 * logits
        chunked = self.predict(
            ChunkedCausalLMLoss(machine, needs_mask=False, chunk_tokens=self.CHUNK), machine, lora=lora
        )
        head, hidden = self.VOCABULARY * self.WIDTH, self.ROWS * self.LENGTH * self.WIDTH
        gradients = 4 * hidden + (0 if lora else 4 * head)
        narrow_head = 0 if precision in ("float32", "bf16-weights") else 2 * head  # the copy that autocast makes
        rows = 5 * 4 * self.CHUNK * self.WIDTH
        assert chunked.parts["loss"] <= 8 * self.CHUNK * self.VOCABULARY + gradients + narrow_head + rows
        rest, rest_of_full = (found.peak_bytes - found.parts["loss"] for found in (chunked, full))
        assert rest <= rest_of_full - narrow_head + 5 * hidden
