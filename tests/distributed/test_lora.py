"""LoRA adapters on several ranks: the adapters of one rank, also with DoRA, after a stop, and with shards."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.distributed_runs import TIGHT, RunFolder, make_run_folder, max_relative_difference
from support.language_models import load_peft, metrics
from support.rank_faults import signal_in_update
from support.tiers import slow

WORDS = (
    "--lora-rank", "2", "--lora-targets", "q_proj,v_proj,down_proj", "--dora", "--rslora", "--steps", "6",
    "--checkpoint-every", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A folder with a run on one rank."""
    folder = make_run_folder(tmp_path_factory.mktemp("lora"))
    folder.train("alone", 1, *WORDS)
    return folder


@pytest.mark.parametrize("parallel", ["ddp", slow("fsdp")])
def test_stopped_run_on_ranks_saves_same_adapters(folder: RunFolder, parallel: str) -> None:
    stop = signal_in_update(3)
    first = folder.train(parallel, 2, *WORDS, "--parallel", parallel, patch=stop, codes=75)
    assert "\ntrained parameters: " in first.stdout()
    folder.resume(parallel, 2)
    for row, expected in zip(metrics(folder.folder / parallel), metrics(folder.folder / "alone"), strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=TIGHT), (row["step"], name)
    assert max_relative_difference(folder.model(parallel), folder.model("alone")) < TIGHT
    assert not (folder.folder / parallel / "model").exists()
    one, other = (settings(folder.folder / out) for out in ("alone", parallel))
    assert one == other


@pytest.mark.slow
def test_quantized_run_on_ranks_saves_same_adapters(folder: RunFolder) -> None:
    words = ("--lora-rank", "2", "--quantize", "nf4-double", "--steps", "4", "--checkpoint-every", "2")
    folder.train("quantized alone", 1, *words)
    folder.train("quantized", 2, *words, patch=signal_in_update(3), codes=75)
    folder.resume("quantized", 2)
    assert max_relative_difference(folder.model("quantized"), folder.model("quantized alone")) < TIGHT


def settings(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return found


def test_adapters_of_a_run_have_its_dtype_and_effect(folder: RunFolder) -> None:
    tokens = torch.tensor([[0, 5, 200, 17, 40]])
    base = AutoModelForCausalLM.from_pretrained(folder.folder / "plain").eval()
    adapted = load_peft(folder.folder / "plain", folder.folder / "alone" / "adapter")
    assert {tensor.dtype for tensor in folder.model("alone").values()} == {torch.float64}
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=tokens).logits, base(input_ids=tokens).logits, atol=1e-3)
