"""How a model is run: what is decided where nobody did, and what is refused or left out, with its reason."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

from bigbatch.compiled_modules import FIXED_OPTIONS
from bigbatch.deterministic import deterministic_kernels
from bigbatch.errors import InputError
from bigbatch.lm.config.field_types import CHECKPOINTING_MODES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.data.dataset import IGNORED, collate
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.model import compilation, setup
from bigbatch.lm.model.causal_attention import NAME
from bigbatch.lm.model.causal_lm_loss import CausalLMLoss
from bigbatch.lm.model.chunked_loss import ChunkedCausalLMLoss
from bigbatch.lm.model.decoder_layers import DecoderLayers
from bigbatch.lm.model.loss_choice import make_loss_fn
from bigbatch.lm.model.setup import ModelSetup, captures_cuda_graphs, compiles_layers, set_up_model
from bigbatch.lm.training.setup import set_up_training
from bigbatch.lm.training.trainer import Trainer
from support.hinted_compiler import HintedCompiler
from support.language_models import records, run, save_model_folder, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
CPU = torch.device("cpu")
DOUBLE = DeviceSpec(CPU, "float64")
EXACT = 1e-12
LONGEST = 20
SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2_SIZE = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZE),
    "gpt2": lambda: GPT2Config(**GPT2_SIZE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "mistral": lambda: MistralConfig(**SIZE, num_key_value_heads=1, sliding_window=LONGEST - 5),
    "gemma2": lambda: Gemma2Config(**SIZE, num_key_value_heads=1, head_dim=8),
    "mamba": lambda: MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=300, state_size=4),
    "wide": lambda: LlamaConfig(**SIZE | {"vocab_size": 20_000}),
}


def test_layers_are_compiled_on_cuda_and_quanta_not_captured() -> None:
    cuda = torch.device("cuda")
    for config, device, compiles, captures in [
        (TrainConfig(), cuda, True, True),
        (TrainConfig(reproducible=True), cuda, True, False),
        (TrainConfig(reproducible=True, compile="none"), cuda, False, False),
        (TrainConfig(reproducible=True, compile="layers"), CPU, True, False),
        (TrainConfig(deterministic=True), cuda, True, True),
        (TrainConfig(compile="none"), cuda, False, False),
        (TrainConfig(), CPU, False, False),
        (TrainConfig(reproducible=True), CPU, False, False),
    ]:
        assert (compiles_layers(config, device), captures_cuda_graphs(config, device)) == (compiles, captures)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KINDS[kind](), dtype=torch.float64)


def arranged(model: Any, **config: Any) -> ModelSetup:
    resolved = TrainConfig(model="the-model", device="cpu", precision="float64", **config).resolved()
    return set_up_model(model, resolved, DOUBLE, pad_id=0, longest=LONGEST)


def samples(*lengths: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(300, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row.roll(-1)} for row in tokens]


SAMPLES = samples(LONGEST, 3, 11, 7)


def gradient(run: ModelSetup, *, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    loss_sum, items = run.loss_fn(run.model, run.collate(SAMPLES))
    assert items == sum(int((sample["labels"] != IGNORED).sum()) for sample in SAMPLES)
    return torch.cat([found.flatten() for found in torch.autograd.grad(loss_sum, trained)])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def full_gradient(model: Any) -> Tensor:
    """The oracle: padded rows with transformers' own mask."""
    loss_sum, _ = CausalLMLoss(DOUBLE)(model.train(), collate(SAMPLES, pad_id=0))
    return torch.cat([found.flatten() for found in torch.autograd.grad(loss_sum, list(model.parameters()))])


# what is decided -------------------------------------------------------------------------------------------------


CANNOT_PACK = {
    "gemma2": "attention with softcap is not supported for packed rows",
    "mamba": "sequences in a packed row affect one another",
}
LAYOUTS = [("auto", kind) for kind in KINDS] + [("padded", kind) for kind in KINDS]
LAYOUTS += [("packed", kind) for kind in KINDS if kind not in CANNOT_PACK]


@pytest.mark.parametrize(("layout", "kind"), LAYOUTS)
def test_cpu_rows_are_padded_unless_packed_requested(layout: str, kind: str) -> None:
    model = build(kind)
    expected = full_gradient(copy.deepcopy(model))
    run = arranged(model, layout=layout)
    assert run.layout == ("packed" if layout == "packed" else "padded")
    assert ("offsets" in run.collate(SAMPLES)) == (layout == "packed")
    assert isinstance(run.loss_fn, ChunkedCausalLMLoss if kind == "wide" else CausalLMLoss)
    assert run.model.training
    assert (run.uses_cuda_graphs, run.notes) == (False, ())
    assert run.layers is not None
    assert (run.layers.is_compiled, run.layers.mode) == (False, "none")
    assert error(gradient(run), expected) <= (1e-5 if kind == "gemma2" else EXACT)  # whose attention is in float32


@pytest.mark.parametrize(("kind", "why"), CANNOT_PACK.items())
def test_unsupported_packed_rows_are_one_sentence(kind: str, why: str) -> None:
    model = build(kind)
    before = model.config._attn_implementation
    with pytest.raises(InputError) as caught:
        arranged(model, layout="packed")
    assert str(caught.value) == f"--layout packed is not supported for the-model: {why}. Use --layout auto or padded."
    assert model.config._attn_implementation == before


def test_model_needing_mask_has_padded_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "drop_mask_if_causal", lambda *_, **__: False)
    with pytest.raises(
        InputError, match=r"--layout packed is not supported for the-model: it needs a mask for padding\. "
    ):
        arranged(build("llama"), layout="packed")
    run = arranged(build("llama"))
    assert run.layout == "padded"
    assert error(gradient(run), full_gradient(build("llama"))) <= EXACT


def test_auto_pads_unpackable_model_with_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where auto wants packed rows; no device is needed to decide it."""

    class AsOnCuda:
        type = "cuda"

    monkeypatch.setattr(setup, "packing_obstacle", lambda *_, **__: "of a reason")
    notes: list[str] = []
    for kind, implementation in (("llama", NAME), ("mistral", "sdpa"), ("gemma2", "eager")):
        model = build(kind)
        setup.drop_mask_if_causal(model, DOUBLE, max_length=LONGEST)
        machine = DeviceSpec(AsOnCuda(), "bf16")  # type: ignore[arg-type]
        layout = setup._layout(model, TrainConfig().resolved(), machine, LONGEST, False, notes)
        assert (layout, model.config._attn_implementation) == ("padded", implementation)
    assert notes == ["rows are padded and not packed: of a reason"] * 3


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_row_is_no_longer_than_token_budget(layout: str) -> None:
    run = arranged(build("llama"), layout=layout, token_budget=41)
    tokens = run.collate(SAMPLES)["input_ids"].numel()
    assert tokens == (sum(len(sample["input_ids"]) for sample in SAMPLES) if layout == "packed" else 4 * LONGEST)


@pytest.mark.parametrize("level", ["auto", *CHECKPOINTING_MODES])
def test_requested_level_is_set(level: str) -> None:
    run = arranged(build("llama"), gradient_checkpointing=level)
    assert run.layers is not None
    assert run.layers.mode == ("none" if level == "auto" else level)
    assert error(gradient(run), full_gradient(build("llama"))) <= EXACT


def test_inputs_in_host_memory_save_nothing_on_cpu() -> None:
    note = "--gradient-checkpointing offload saves no memory on cpu, which has none but that of the host"
    for level in CHECKPOINTING_MODES:
        assert (note in arranged(build("llama"), gradient_checkpointing=level).notes) == (level == "offload")


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_adapters_are_added_to_found_layers(layout: str) -> None:
    gradients = []
    for chosen in ("padded", layout):
        run = arranged(build("llama"), layout=chosen, lora_rank=2, seed=3, gradient_checkpointing="full")
        assert run.layout == chosen
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        gradients.append(gradient(run))
    assert error(gradients[1], gradients[0]) <= EXACT


def test_unsupported_adapters_are_rejected() -> None:
    with pytest.raises(InputError, match=r"^--lora-rank is not supported for the-model: .*Mamba"):
        arranged(build("mamba"), lora_rank=2)


@pytest.mark.parametrize(
    ("more", "flags", "left_out"),
    [
        ({"dora": True}, "--lora-rank with --dora", "--dora"),
        (
            {"dora": True, "lora_dropout": 0.1},
            "--lora-rank with --dora and --lora-dropout",
            "--dora and --lora-dropout",
        ),
    ],
    ids=["dora", "both"],
)
def test_adapters_that_peft_lacks_for_experts_are_rejected(more: dict[str, Any], flags: str, left_out: str) -> None:
    config = MixtralConfig(**SIZE, num_key_value_heads=1, num_local_experts=2)
    with pytest.raises(InputError) as caught:
        arranged(AutoModelForCausalLM.from_config(config), lora_rank=2, **more)
    assert str(caught.value).startswith(
        f"{flags} is not supported for the-model: lora.ParamWrapper does not work with "
    )
    assert str(caught.value).endswith(f". Leave out {left_out}, or name other --lora-targets.")
    arranged(AutoModelForCausalLM.from_config(config), lora_rank=2, lora_targets="q_proj,v_proj", **more)


def test_output_layer_with_adapter_uses_all_logits() -> None:
    run = arranged(build("wide"), lora_rank=2, lora_targets="lm_head,q_proj")
    assert type(run.loss_fn) is CausalLMLoss
    assert gradient(run).abs().sum() > 0
    assert type(arranged(build("wide"), lora_rank=2).loss_fn) is ChunkedCausalLMLoss


@pytest.mark.parametrize("level", ["selective", "full"])
def test_unsupported_recomputation_is_rejected(level: str) -> None:
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(
        InputError, match=r"^--gradient-checkpointing is not supported for the-model: .*does not support"
    ):
        arranged(model, gradient_checkpointing=level)


@pytest.mark.parametrize("level", ["auto", "none"])
def test_model_without_transformers_layers_is_unchanged(level: str) -> None:
    model = build("llama")
    model.supports_gradient_checkpointing = False
    run = arranged(model, gradient_checkpointing=level)
    assert run.layers is None
    assert error(gradient(run), full_gradient(build("llama"))) <= EXACT


# compiled --------------------------------------------------------------------------------------------------------


Compile = Callable[..., Any]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Compile], Compile]], list[dict[str, Any]]]:
    """Let ``torch.compile`` give what the test makes of a layer's call, and keep what it was asked for."""

    def put(make: Callable[[Compile], Compile]) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def compile_(call: Compile, **options: Any) -> Compile:
            asked.append(options)
            return make(call)

        monkeypatch.setattr(torch, "compile", compile_)
        return asked

    return put


def exact(call: Compile) -> Compile:
    return lambda *inputs, **options: call(*inputs, **options)


def shifted(call: Compile) -> Compile:
    """What is compiled wrong: hidden states come out a place too early."""

    def wrong(*inputs: Any, **options: Any) -> Any:
        found = call(*inputs, **options)
        return found.roll(-1, 1) if isinstance(found, Tensor) else (found[0].roll(-1, 1), *found[1:])

    return wrong


def wrong_backward(call: Compile) -> Compile:
    """What is compiled wrong in backward alone."""

    def wrong(hidden: Tensor, *inputs: Any, **options: Any) -> Any:
        return call(1.5 * hidden - 0.5 * hidden.detach(), *inputs, **options)

    return wrong


def mixed(call: Compile) -> Compile:
    """What is compiled wrong: the features of hidden states come out in another order."""

    def wrong(*inputs: Any, **options: Any) -> Any:
        found = call(*inputs, **options)
        return found.flip(-1) if isinstance(found, Tensor) else (found[0].flip(-1), *found[1:])

    return wrong


def failing(_: Compile) -> Compile:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel for this.\nand many lines more")

    return fail


def test_cpu_compiles_nothing_unless_requested(compiler: Any) -> None:
    asked = compiler(exact)
    for compile_ in ("auto", "none"):
        run = arranged(build("llama"), compile=compile_)
        assert not run.layers.is_compiled  # type: ignore[union-attr]
    assert asked == []
    run = arranged(build("llama"), compile="layers", gradient_checkpointing="selective")
    assert len(asked) == 2
    assert all((options["dynamic"], options["backend"]) == (True, "inductor") for options in asked)
    assert run.layers is not None
    assert (run.layers.is_compiled, run.layers.mode, run.uses_cuda_graphs, run.notes) == (True, "selective", False, ())
    assert error(gradient(run), full_gradient(build("llama"))) <= EXACT


def test_deterministic_compiler_times_nothing(compiler: Any) -> None:
    asked = compiler(exact)
    for deterministic in (False, True):
        arranged(build("llama"), compile="layers", deterministic=deterministic)
        assert [options["options"].get("deterministic", False) for options in asked] == [deterministic] * 2
        asked.clear()
    assert "deterministic" in torch._inductor.config._config, "an option of this torch"


def test_reproducible_layers_and_loss_are_compiled_with_fixed_options(compiler: Any) -> None:
    asked = compiler(exact)
    run = arranged(build("wide"), compile="layers", reproducible=True)
    of_layers, of_loss = asked
    rounding = {"emulate_precision_casts": True, "fallback_random": False}
    assert (of_layers["options"], of_loss["options"]) == (FIXED_OPTIONS | rounding, FIXED_OPTIONS)
    assert isinstance(run.loss_fn, ChunkedCausalLMLoss)
    assert run.loss_fn.fused_code is not None
    assert run.loss_fn.fused_code.is_fixed


def hinted(monkeypatch: pytest.MonkeyPatch) -> HintedCompiler:
    compiler = HintedCompiler()
    monkeypatch.setattr(torch, "compile", compiler.compile)
    return compiler


FIXED = {"llama": {}, "lora": {"lora_rank": 2}, "gpt2": {}, "gemma2": {}, "wide": {}}


@pytest.mark.parametrize("kind", FIXED)
def test_nothing_is_compiled_after_reproducible_set_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the lengths of a quantum, nor for a mode of activation checkpointing, nor in backward."""
    compiler = hinted(monkeypatch)
    model = build("llama" if kind == "lora" else kind)
    run = arranged(model, compile="layers", reproducible=True, **FIXED[kind])
    assert run.layers is not None
    compiled = list(compiler.sizes)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert compiled
    with deterministic_kernels():
        for mode in CHECKPOINTING_MODES:
            run.layers.set_checkpointing(mode)
            for lengths in ((LONGEST, 3), (7, 7), (16, 2), (11, 5)):
                torch.autograd.grad(run.loss_fn(run.model, run.collate(samples(*lengths)))[0], trained)
    assert compiler.sizes == compiled
    assert compilation.eager_note(run.layers, lambda counts: [counts]) is None
    if kind == "wide":
        assert isinstance(run.loss_fn, ChunkedCausalLMLoss)
        assert run.loss_fn.fused_code is not None
        assert (run.loss_fn.fused_code.num_calls, run.loss_fn.fused_code.num_eager_calls) == (16, 0)
        monkeypatch.setattr(run.loss_fn.fused_code, "run", None)
        run.loss_fn(run.model, run.collate(samples(5, 5)))  # of a trial, without the code


def test_inputs_without_code_run_eagerly_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows up to the window of the attention need no mask, and longer ones do; set-up compiles for those."""
    compiler = hinted(monkeypatch)
    run, expected = (
        arranged(build("mistral"), compile=compile_, layout="padded", reproducible=True)
        for compile_ in ("layers", "none")
    )
    assert run.layers is not None
    compiled = list(compiler.sizes)
    with deterministic_kernels():
        run.loss_fn(run.model, run.collate(samples(LONGEST, 7)))
        rows = run.collate(samples(9, 7))
        assert torch.equal(run.loss_fn(run.model, rows)[0], expected.loss_fn(expected.model, rows)[0])
        run.loss_fn(run.model.eval(), rows)
    assert compiler.sizes == compiled
    assert run.layers.eager_calls == (2, 4)
    assert compilation.eager_note(run.layers, lambda counts: [counts, [0, 1_000]]) == (
        "2 of 1,004 calls of compiled layers ran eagerly: nothing was compiled for such inputs before the first update"
    )


def test_trial_is_the_same_for_every_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for more in ({"token_budget": 40}, {"token_budget": 4096}, {"microbatch": 2}, {"gradient_checkpointing": "full"}):
        compiler = hinted(monkeypatch)
        arranged(build("llama"), compile="layers", reproducible=True, **more)
        sizes.append(compiler.sizes)
        assert compiler.sizes
    assert sizes == sizes[:1] * 4


def test_reproducible_rows_are_the_same_for_every_memory_limit() -> None:
    shapes = [
        arranged(build("llama"), layout="packed", reproducible=True, token_budget=budget)
        .collate(samples(LONGEST, 13))["input_ids"]
        .shape
        for budget in (34, 4096)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0][1] > 34


@pytest.mark.parametrize(
    ("longest", "quantum", "expected"),
    [
        (20, None, [20, 10, 6]),
        (20, 2, [20, 10]),
        (20, 1, [20]),
        (20, 4, [20, 10, 6, 20]),
        (1, 3, [1, 1, 1]),
        (9_000, 64, [9_000, 4_500]),
    ],
)
def test_trial_has_sequences_of_three_lengths(longest: int, quantum: int | None, expected: list[int]) -> None:
    assert compilation.trial_lengths(longest, quantum) == expected


def test_graphs_are_rejected_on_cpu(compiler: Any) -> None:
    compiler(exact)
    with pytest.raises(InputError) as caught:
        arranged(build("llama"), compile="graphs")
    assert str(caught.value) == "--compile graphs needs CUDA, but this run is on cpu. Use --compile layers or none."


WRONG: dict[str, tuple[Callable[[Compile], Compile], str]] = {
    "forward": (shifted, r"its compiled results differ by \de[-+]\d\d"),
    "backward": (wrong_backward, r"its compiled results differ by \de[-+]\d\d"),
    "compiler": (failing, r"no kernel for this"),
}


@pytest.mark.parametrize("where", WRONG)
def test_miscompiled_model_is_rejected_when_compilation_requested(where: str, compiler: Any) -> None:
    make, why = WRONG[where]
    compiler(make)
    with pytest.raises(
        InputError, match=rf"^--compile layers is not supported for the-model: {why}\. Use --compile auto or "
    ):
        arranged(build("llama"), compile="layers")


def test_features_mixed_up_by_compiler_are_detected(compiler: Any) -> None:
    compiler(mixed)
    with pytest.raises(InputError, match="its compiled results differ by"):
        arranged(build("llama"), compile="layers")


def test_loss_of_miscompiled_reproducible_layers_is_not_compiled(compiler: Any) -> None:
    compiler(failing)
    model = build("wide").train()
    config = TrainConfig(reproducible=True).resolved()
    loss_fn = make_loss_fn(config, DOUBLE, chunk_tokens=8, needs_mask=False, longest=LONGEST, fused=True)
    layers, notes = DecoderLayers(model), list[str]()
    collator = lambda rows: collate(rows, pad_id=0)  # noqa: E731
    compilation.compile_layers(model, config, layers, loss_fn, collator, DOUBLE, LONGEST, notes)
    assert notes == ["layers are not compiled: no kernel for this"]
    assert isinstance(loss_fn, ChunkedCausalLMLoss)
    assert loss_fn.fused_code is not None
    assert (layers.is_compiled, loss_fn.fused_code.is_compiled) == (False, False)


@pytest.mark.parametrize("where", WRONG)
def test_auto_skips_miscompiled_model_with_note(where: str, compiler: Any) -> None:
    """As on CUDA, where auto compiles; what decides about it is the same here."""
    compiler(WRONG[where][0])
    model = build("llama").train()
    layers, notes = DecoderLayers(model), list[str]()
    layers.set_checkpointing("selective")
    loss_fn, collator = CausalLMLoss(DOUBLE, needs_mask=False), lambda rows: collate(rows, pad_id=0)
    config = TrainConfig().resolved()
    compilation.compile_layers(model, config, layers, loss_fn, collator, DOUBLE, LONGEST, notes)
    assert (layers.is_compiled, layers.mode) == (False, "selective")
    (note,) = notes
    assert note.startswith("layers are not compiled: ")
    run = ModelSetup(model, loss_fn, collator, "padded", layers, False, ())
    assert error(gradient(run), full_gradient(build("llama"))) <= EXACT


@pytest.mark.parametrize("make", [exact, shifted, failing])
def test_compiler_trial_restores_model_and_random_state(make: Any, compiler: Any) -> None:
    compiler(make)
    model = build("gpt2").train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    collator = lambda rows: collate(rows, pad_id=0)  # noqa: E731
    arguments = (DecoderLayers(model), CausalLMLoss(DOUBLE), collator, DOUBLE, LONGEST, [])
    compilation.compile_layers(model, TrainConfig().resolved(), *arguments)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_model_without_transformers_layers_is_not_compiled(compiler: Any) -> None:
    compiler(exact)
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(
        InputError, match="--compile layers is not supported for the-model: its layers are not those of "
    ):
        arranged(model, compile="layers")


# in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("job")
    base = str(save_model_folder(folder / "base"))
    data = str(write_jsonl(folder / "data.jsonl", records(30)))
    return {"data": data, "model": base, "steps": 3, "global_batch": 8, "precision": "float64"}


def test_packed_and_padded_runs_train_identically(tmp_path: Path, job: dict[str, Any]) -> None:
    ends, losses = [], []
    for name, settings in {
        "padded": {"microbatch": 8, "layout": "padded"},
        "packed": {"token_budget": 70, "layout": "packed"},
        "packed by samples": {"microbatch": 3, "layout": "packed", "gradient_checkpointing": "full"},
        "auto": {"layout": "packed"},
    }.items():
        prepared, recorder, outcome = run(tmp_path / name, **job, **settings)
        assert prepared.model_setup.layout == settings["layout"]
        ends.append(torch.cat([parameter.detach().flatten() for parameter in prepared.model.parameters()]))
        losses.append([row["loss"] for row in recorder.rows] + [outcome.validation_loss])
        assert len({row["items"] for row in recorder.rows}) > 1
    for end, loss in zip(ends[1:], losses[1:], strict=True):
        assert error(end, ends[0]) <= 1e-10
        assert loss == pytest.approx(losses[0], rel=1e-12)


def test_packed_row_stays_within_run_budget(job: dict[str, Any]) -> None:
    trainer = Trainer(set_up_training(TrainConfig(**job, device="cpu", token_budget=70, layout="packed")))
    lengths = trainer.setup.training.lengths
    groups = trainer.engine.groups(lengths)
    rows = [trainer.setup.collate([trainer.setup.training[i] for i in group]) for group in groups]
    assert max(row["input_ids"].shape[1] for row in rows) <= 70
    assert max(sum(lengths[i] for i in group) for group in groups) > 64, "budgets are not rounded down"
