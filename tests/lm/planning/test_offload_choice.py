"""The level that ``bigbatch train --offload auto`` chooses, and what it says about it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bigbatch.lm
from bigbatch.cli import main
from bigbatch.errors import InputError
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.device import DeviceSpec
from bigbatch.lm.distributed.ranks import SINGLE_PROCESS, RankContext
from bigbatch.lm.planning import offload_choice
from bigbatch.lm.planning.device_target import PlanTarget
from bigbatch.lm.planning.offload_choice import with_chosen_offload
from bigbatch.lm.runs.file_names import CONFIG
from bigbatch.memory.usage import MemoryBudget
from bigbatch.offload.cards import card
from bigbatch.offload.levels import Offload
from support.language_models import records, save_model_folder, write_jsonl


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(20))
    save_model_folder(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_card(monkeypatch: pytest.MonkeyPatch, usable_bytes: int, host_bytes: int = 2**40) -> None:
    """Plan for a card of so much memory in this machine."""
    device = torch.device("cuda")
    spec = DeviceSpec(torch.device("cpu"), "bf16")
    target = PlanTarget("a card, bf16", device, spec, MemoryBudget(usable_bytes, usable_bytes), is_local=True)
    monkeypatch.setattr(offload_choice, "resolve_target", lambda config: target)
    monkeypatch.setattr(offload_choice, "local_card", lambda device: card("h100"))
    monkeypatch.setattr(offload_choice, "measure_link_rate", lambda device: None)
    monkeypatch.setattr(offload_choice, "available_host_bytes", lambda **_: host_bytes)


def chosen(**settings: Any) -> tuple[TrainConfig, str | None]:
    given = {"data": "data.jsonl", "model": "base", "offload": "auto", "max_length": 32}
    return with_chosen_offload(TrainConfig(**given | settings), SINGLE_PROCESS, progress=lambda *_: None)


def test_level_that_is_set_stays(place: Path) -> None:
    config, sentence = chosen(offload="optimizer")
    assert (config.offload, sentence) == ("optimizer", None)


def test_enough_memory_needs_no_offload(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(monkeypatch, 2**34)
    config, sentence = chosen()
    assert (config.offload, config.gradient_checkpointing) == ("none", "auto")
    assert sentence is not None
    assert sentence.startswith("offload none, chosen by auto: ")
    end = r" on the card with checkpointing none, 0 B on the host, about [\d.]+ ms an update$"
    assert re.search(end, sentence), sentence


def test_slowest_link_of_the_ranks_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate of 2 bytes a second in place of 50 billions, an update takes as many times as long."""
    seconds = []
    for of_other in (50e9, 2.0):
        on_card(monkeypatch, 2**34)
        monkeypatch.setattr(offload_choice, "measure_link_rate", lambda device: 50e9)
        monkeypatch.setattr(RankContext, "all_gather", lambda _, own, other=of_other: [own, other])
        sentence = chosen_level(monkeypatch, "optimizer")
        found = re.search(r"about ([\d,.]+) (m?)s an update$", sentence)
        assert found is not None, sentence
        seconds.append(float(found[1].replace(",", "")) / (1000 if found[2] else 1))
    assert seconds[0] < 1 < 1000 < seconds[1]


def chosen_level(monkeypatch: pytest.MonkeyPatch, level: Offload) -> str:
    """Return the sentence about a level that is the only one."""
    monkeypatch.setattr(offload_choice, "levels_of", lambda config: [level])
    config, sentence = chosen()
    assert config.offload == level
    assert sentence is not None
    return sentence


def test_fixed_microbatch_has_its_checkpointing_chosen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(monkeypatch, 2**34)
    assert chosen(microbatch=4)[0].gradient_checkpointing == "none"
    assert chosen(microbatch=4, gradient_checkpointing="full")[0].gradient_checkpointing == "full"


def test_sentence_counts_inputs_of_layers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(monkeypatch, 2**34)
    config, sentence = chosen(microbatch=4, gradient_checkpointing="offload")
    assert (config.offload, config.gradient_checkpointing) == ("none", "offload")
    assert sentence is not None
    assert " on the card with checkpointing offload, " in sentence
    assert ", 0 B on the host" not in sentence


def test_too_little_memory_is_refused_with_the_flag(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(monkeypatch, 2**20)
    with pytest.raises(
        InputError, match=r"^--offload auto: no level of offload fits: .* 1\.0 MiB are usable\. Pass a level"
    ):
        chosen()


def test_cpu_run_trains_without_offload(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "data.jsonl", "--model", "base", "--max-length", "32", "--steps", "1", "--out", "run"]
    assert main(["train", *words, "--device", "cpu", "--offload", "auto", "--microbatch", "4"]) == 0
    note = "\noffload none, chosen by auto: on cpu it saves nothing\n"
    assert note in capfd.readouterr().out
    assert json.loads((Path("run") / CONFIG).read_text())["offload"] == "none"


def test_memory_of_a_gpu_is_refused_without_one(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "data.jsonl", "--model", "base", "--device", "cpu", "--offload", "auto", "--gpu", "rtx-4090"]
    assert main(["train", *words, "--out", "run"]) == 2
    assert capfd.readouterr().err == (
        "bigbatch train: --gpu rtx-4090 needs a CUDA device, and this run is on cpu. Pass --memory.\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--offload", "optimiser"),
            "--offload is 'optimiser': it must be none, optimizer, master, gradients or auto.",
        ),
        (
            ("--offload", "optimizer", "--parallel", "fsdp"),
            "--offload optimizer is not supported with --parallel fsdp and hsdp, which shard the optimizer state: use "
            "ddp, or --offload none.",
        ),
        (
            ("--offload", "optimizer", "--optimizer", "adamw-8bit"),
            "--offload optimizer is not supported with --optimizer adamw-8bit, whose state is quantized: use adamw.",
        ),
    ],
    ids=["misspelled", "sharded", "8 bits"],
)
def test_level_that_is_also_a_flag_is_named_as_given(
    words: tuple[str, ...], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 2
    assert capfd.readouterr().err == f"bigbatch train: {sentence}\n"


def test_python_api_names_the_commands_that_choose(place: Path) -> None:
    with pytest.raises(InputError) as caught:
        bigbatch.lm.train({"data": "data.jsonl", "model": "base", "device": "cpu", "offload": "auto", "out": "run"})
    assert str(caught.value) == (
        "--offload auto is chosen by bigbatch train and bigbatch resume: pass a level here, such as the one that "
        "bigbatch plan --offload auto prints."
    )
