"""Packed rows where they are for: on CUDA, with its kernel, compiled layers and recorded launches."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, GPT2Config, Lfm2Config, LlamaConfig, MistralConfig, Qwen2Config

from bigbatch import Engine, TokenBudget
from bigbatch.errors import InputError
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model.causal_attention import use_causal_attention
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.packed_rows import pack_row, packing_obstacle
from bigbatch.lm.model.setup import ModelSetup, set_up_model
from bigbatch.verification.tolerances import TOLERANCES

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of compilers
DEVICE = torch.device("cuda")
BF16 = DeviceSpec(DEVICE, "bf16")
TOLERANCE = TOLERANCES[torch.bfloat16]
ROOM = 1.5  # by which two ways of rounding may differ
VOCABULARY = 300
LONGEST = 96
SIZE = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256,
}  # fmt: skip
GPT2_SIZE = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZE),
    "qwen2": lambda: Qwen2Config(**SIZE, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**GPT2_SIZE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "mistral": lambda: MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=17),
}
LENGTHS = (LONGEST, 1, 40, 63, 7, 2, 30, 18)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def build(config: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.ndim > 1 else 1)  # attention that matters
    return model


def samples(*lengths: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        tokens = torch.randint(VOCABULARY, (length + 1,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.25, IGNORED, tokens[1:])
        made.append({"input_ids": tokens[:-1], "labels": labels})
    return made


def there(microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in microbatch.items()}


def packed(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    return there(pack_row(samples(*lengths, seed=seed), pad_id=0, longest=LONGEST))


def padded(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    return there(collate(samples(*lengths, seed=seed), pad_id=0))


def outcome(model: Any, loss_fn: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum and its gradient by all that is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum, _ = loss_fn(model, microbatch)
    found = torch.autograd.grad(loss_sum, trained)
    return loss_sum.detach().double(), torch.cat([gradient.double().flatten() for gradient in found])


def errors(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def exact(model: Any) -> tuple[Tensor, Tensor]:
    """The oracle: float64, padded, with transformers' own mask."""
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("sdpa")
    return outcome(wide, CausalLMLoss(DeviceSpec(DEVICE, "float64")), padded(*LENGTHS))


LOSS = CausalLMLoss(BF16, needs_mask=False, longest=LONGEST)


# the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_as_accurate_as_padded(kind: str) -> None:
    model = build(KINDS[kind]())
    expected = exact(model)
    theirs = errors(outcome(model, CausalLMLoss(BF16), padded(*LENGTHS)), expected)
    use_causal_attention(model)
    ours = errors(outcome(model, LOSS, packed(*LENGTHS)), expected)
    assert max(ours) <= TOLERANCE
    assert all(a <= ROOM * b + 1e-3 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_row_without_offsets_changes_loss(kind: str) -> None:
    """The bound above must notice sequences that see one another."""
    model = build(KINDS[kind]())
    expected = exact(model)
    use_causal_attention(model)
    row = packed(*LENGTHS)
    size = row["input_ids"].shape[1]
    row["offsets"] = torch.tensor([0, size], dtype=torch.int32, device=DEVICE)
    loss_fn = CausalLMLoss(BF16, needs_mask=False, longest=size)
    assert max(errors(outcome(model, loss_fn, row), expected)) > TOLERANCE


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_pass_attention_arguments_are_supported(kind: str, precision: str) -> None:
    machine = DeviceSpec(DEVICE, precision)
    model = build(KINDS[kind](), dtype=machine.weights_dtype)
    use_causal_attention(model)
    assert packing_obstacle(model, machine, longest=LONGEST) is None


def test_leak_hidden_by_rounding_is_found() -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "intermediate_size": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Lfm2Config(**shape, **layers, vocab_size=VOCABULARY)).to(DEVICE)
    use_causal_attention(model)
    assert packing_obstacle(model, BF16, longest=LONGEST) == "sequences in a packed row affect one another"


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_do_not_influence_each_other(kind: str) -> None:
    model = build(KINDS[kind]()).eval()
    use_causal_attention(model)
    given, other = samples(*LENGTHS), samples(*LENGTHS, seed=1)
    with torch.no_grad(), BF16.autocast():
        rows = [
            there(pack_row(rows, pad_id=0, longest=LONGEST)) for rows in (given, [*given[:3], other[3], *given[4:]])
        ]
        logits = [model(**{name: tensor for name, tensor in inputs(row).items()}).logits[0] for row in rows]  # noqa: C416
    lengths = [*LENGTHS, logits[0].shape[0] - sum(LENGTHS)]
    for index, (before, after) in enumerate(zip(*(each.split(lengths) for each in logits), strict=True)):
        assert torch.equal(before, after) == (index != 3)


def inputs(row: dict[str, Tensor]) -> dict[str, Any]:
    offsets = {f"cu_seq_lens_{side}": row["offsets"] for side in "qk"}
    return {
        "input_ids": row["input_ids"],
        "position_ids": row["position_ids"],
        **offsets,
        "max_length_q": LONGEST,
        "max_length_k": LONGEST,
        "use_cache": False,
    }


def fill_memory_with_nan() -> None:
    """Leave NaN in what the allocator gives next, in blocks of all sizes."""
    junk = [
        torch.full((num_bytes // 2,), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        for num_bytes in (2**28, *[2**24] * 8, *[2**21] * 32, *[2**18] * 64, *[2**13] * 256)
        for _ in range(2)
    ]
    del junk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", CHECKPOINTING_MODES)
def test_filling_introduces_no_nan(kind: str, level: Any) -> None:
    """What a kernel leaves unwritten holds what was there before."""
    model = build(KINDS[kind]())
    use_causal_attention(model)
    DecoderLayers(model).set_checkpointing(level)
    for lengths in ((LONGEST, 1), (3,), LENGTHS, (64,), (65,), tuple([1] * 100)):
        row = packed(*lengths)
        fill_memory_with_nan()
        loss_sum, gradient = outcome(model, LOSS, row)
        assert loss_sum.isfinite()
        assert gradient.isfinite().all(), lengths


# compiled layers -------------------------------------------------------------------------------------------------


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


VARIED = ((LONGEST, 40, 9), (LONGEST,) * 7, (3,), (1,) * 90, (50,) * 11, (64, 64), (2, LONGEST, 17, 80, 80))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_compile_once_with_same_gradients(kind: str) -> None:
    model = build(KINDS[kind]())
    use_causal_attention(model)
    expected = [outcome(model, LOSS, packed(*lengths, seed=seed)) for seed, lengths in enumerate(VARIED)]
    layers = DecoderLayers(model)
    layers.compile()
    counts = []
    for seed, lengths in enumerate(VARIED):
        found = outcome(model, LOSS, packed(*lengths, seed=seed))
        assert max(errors(found, expected[seed])) <= TOLERANCE
        counts.append(graphs())
    assert counts[0] > 0
    assert counts == counts[:1] * len(VARIED), "no row is compiled for anew"
    layers.set_checkpointing("selective")
    for seed, lengths in enumerate(VARIED):
        assert max(errors(outcome(model, LOSS, packed(*lengths, seed=seed)), expected[seed])) <= TOLERANCE


# as a run has it -------------------------------------------------------------------------------------------------


def arranged(model: Any, machine: DeviceSpec = BF16, **settings: Any) -> ModelSetup:
    config = TrainConfig(model="the-model", precision=machine.precision, **settings).resolved()
    return set_up_model(model, config, machine, pad_id=0, longest=LONGEST)


def engine_of(run: ModelSetup, **settings: Any) -> Engine:
    return Engine(
        run.model,
        torch.optim.AdamW(run.model.parameters(), lr=1e-4, fused=True),
        run.loss_fn,
        collate=run.collate,
        lengths=lambda rows: [len(row["input_ids"]) for row in rows],
        layout=run.layout,
        cuda_graphs=run.uses_cuda_graphs,
        **{"microbatch": TokenBudget(512), **settings},
    )


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 20_000], ids=["all logits", "chunks"])
def test_small_bfloat16_model_is_packed_compiled_and_captured(vocabulary: int) -> None:
    config = Qwen2Config(**SIZE | {"vocab_size": vocabulary}, num_key_value_heads=2, tie_word_embeddings=True)
    run = arranged(build(config))
    assert run.notes == ()
    assert run.layers is not None
    assert (run.layout, run.layers.is_compiled, run.layers.mode, run.uses_cuda_graphs) == ("packed", True, "none", True)
    engine = engine_of(run)
    plain = arranged(build(config), layout="padded", compile="none")
    assert plain.layers is not None
    assert (plain.layout, plain.layers.is_compiled, plain.uses_cuda_graphs) == ("padded", False, False)
    reference = engine_of(plain)
    for window in range(5):
        batch = samples(*LENGTHS, *[40 + 3 * window] * 20, seed=window)
        found, expected = engine.step(batch), reference.step(batch)
        assert (found.items, found.tokens) == (expected.items, expected.tokens)
        assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
        assert found.num_microbatches <= expected.num_microbatches
        if window == 1:
            compiled = graphs()
    assert engine.runner is not None
    assert engine.runner.disabled_reason is None
    assert engine.runner.num_graphs > 0
    assert graphs() == compiled, "no window is compiled for anew"
    ends = [torch.cat([p.detach().flatten() for p in each.model.parameters()]) for each in (engine, reference)]
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) <= TOLERANCE


@pytest.mark.parametrize("level", CHECKPOINTING_MODES)
def test_adapters_and_recomputation_are_compiled_and_captured(level: str) -> None:
    losses = []
    for settings in ({"layout": "padded", "compile": "none"}, {}):
        run = arranged(build(KINDS["qwen2"]()), lora_rank=4, gradient_checkpointing=level, **settings)
        assert run.layout == ("padded" if settings else "packed")
        engine = engine_of(run)
        losses.append([engine.step(samples(*LENGTHS, *[40] * 20, seed=window)).loss for window in range(4)])
        if not settings:
            assert engine.runner is not None
            assert engine.runner.disabled_reason is None
            assert engine.runner.captures_graphs == (level != "offload")
            assert level == "offload" or engine.runner.num_graphs > 0
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)


def test_float32_rows_are_padded_with_reported_reason() -> None:
    machine = DeviceSpec(DEVICE, "float32")
    run = arranged(build(KINDS["llama"]()), machine, compile="none")
    assert run.layout == "padded"
    assert run.notes == ("rows are padded and not packed: attention has no kernel for packed rows in float32",)
    with pytest.raises(
        InputError, match="--layout packed is not supported for the-model: attention has no kernel for "
    ):
        arranged(build(KINDS["llama"]()), machine, layout="packed")


def test_attention_dropout_prevents_packed_rows() -> None:
    model = build(GPT2Config(**GPT2_SIZE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0.1))
    run = arranged(model, compile="none")
    assert run.layout == "padded"
    assert run.notes == ("rows are padded and not packed: attention with dropout is not supported for packed rows",)


@pytest.mark.parametrize("records", [False, True])
def test_peak_memory_does_not_grow_with_packed_microbatches(records: bool) -> None:
    run = arranged(build(KINDS["qwen2"]()), compile="graphs" if records else "layers")
    assert (run.layout, run.uses_cuda_graphs) == ("packed", records)
    engine = engine_of(run, microbatch=TokenBudget(640))
    batches = [samples(*[64] * 10 * num_microbatches) for num_microbatches in (2, 64)]
    for _ in range(2):
        engine.step(batches[0])
    peaks = []
    for num_microbatches, batch in zip((2, 64), batches, strict=True):
        torch.cuda.reset_peak_memory_stats()
        assert engine.step(batch).num_microbatches == num_microbatches
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] / peaks[0] <= 1.01


@pytest.mark.filterwarnings("default:Synchronization debug mode")
def test_no_packed_microbatch_waits_for_device() -> None:
    run = arranged(build(KINDS["qwen2"]()), compile="layers")
    row = {name: tensor.to(DEVICE) for name, tensor in run.collate(samples(*LENGTHS)).items()}
    trained = list(run.model.parameters())
    torch.autograd.grad(run.loss_fn(run.model, row)[0], trained)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(run.loss_fn(run.model, row)[0], trained)
    finally:
        torch.cuda.set_sync_debug_mode(before)
