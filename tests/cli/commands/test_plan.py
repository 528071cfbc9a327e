"""``bigbatch plan``: sentences or JSON about what a run will need, and an exit code that says whether it fits."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from bigbatch.cli import main
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.planning import forecast as forecasts
from bigbatch.lm.planning.forecast import Forecast
from bigbatch.memory.limit import describe_bytes
from support.command_line import command, files_below, pretend_terminal, terminal_lines
from support.language_models import records, save_model_folder, write_jsonl
from support.tiers import slow

SMALL = ("plan", "--data", "../data.jsonl", "--model", "../base")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_jsonl(folder / "data.jsonl", records(40))
    save_model_folder(folder / "base")
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with data and a model beside it; nothing may be written anywhere."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def planned(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a plan prints, which writes nothing."""
    around = Path.cwd().parent
    before = files_below(around)
    assert main([*words]) == code
    printed, complained = capfd.readouterr()
    assert complained == ""
    assert files_below(around) == before
    return printed


@pytest.fixture
def one_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every plan of a test show the same forecast, which is made once."""
    make, made = forecasts.forecast, []

    def forecast(config: TrainConfig, **options: Any) -> Forecast:
        if not made:
            made.append((config, make(config, **options)))
        assert made[0][0] == config
        return made[0][1]

    monkeypatch.setattr(forecasts, "forecast", forecast)


def test_plan_is_printed_in_order(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = planned(capfd, *SMALL, "--microbatch", "10", "--global-batch", "24", "--memory", "4GiB", "--epochs", "3")
    expected = r"""reading \.\./data\.jsonl …
measuring the documents …
predicting the memory …
timing an update with random weights …
predicting memory savings …
\.\./base, 15,056 parameters, all trained, on cpu, float32

micro-batches of up to 10 sequences: as asked
peak memory of an update \(phase: (forward|backward)\):
  parameters +58\.8 KiB
  gradients +58\.8 KiB
  optimizer +117\.7 KiB
  activations +[\d.]+ .iB
  loss +[\d.]+ .i?B
  total +[\d.]+ .iB
  fits: [\d.]+ .iB needed, [\d.]+ GiB usable of 4GiB

first update:
24 sequences, \d+ tokens, padded
3 micro-batches, at most 10 sequences each

       # .*
       0  █.*
       1  █.*
       2  █.*

fill [\d.]+%, waste [\d.]+%: \d+ tokens with padding \(█ tokens, ░ padding\)
the largest micro-batch has \d+ tokens

time per update: .*\d( s)? \(measured with random weights\); 6 updates: .*\d( s)?, without validation
settings that lower the peak for the same micro-batch:
  --gradient-checkpointing full  +[\d.]+ .iB  \(−[\d.]+ .iB\)
  --precision bf16-weights  +[\d.]+ .iB  \(−[\d.]+ .iB\)
"""
    pattern = expected.splitlines()
    lines = printed.splitlines()
    assert len(lines) == len(pattern), printed
    levers = pattern[-2:]
    for line, expected_line in zip(lines[:-2], pattern[:-2], strict=True):
        assert re.fullmatch(expected_line, line), line
    assert all(any(re.fullmatch(lever, line) for lever in levers) for line in lines[-2:])


def test_plan_for_old_gpu_fits_forty_columns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch, 40)
    words = ("--gpu", "Tesla T4", "--microbatch", "1", "--layout", "padded", "--global-batch", "20")
    lines = terminal_lines(planned(capfd, *SMALL, *words))
    assert max(map(len, lines)) <= 40
    text = " ".join(" ".join(lines).split())
    assert " parameters, all trained, on t4, fp16 " in text
    assert "bf16-weights" not in text, "T4 only emulates bf16"
    table = lines[lines.index("     #    seqs   longest       tokens") :]
    assert [line.split()[0] for line in table[1:18]] == [*map(str, range(8)), "…", *map(str, range(12, 20))]
    assert table[9] == "     … 4 more"


def test_files_left_out_are_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "set").mkdir()
    for split in ("train", "test"):
        shutil.copy(folder.parent / "data.jsonl", folder.parent / "set" / f"{split}.jsonl")
    words = ("plan", "--model", "../base", "--data", "../set", "--microbatch", "4", "--gpu", "t4", "--json")
    assert json.loads(planned(capfd, *words))["notes"][0] == (
        "../set is laid out like a dataset of the hub: only 1 file of the split train is used, not test.jsonl"
    )


@pytest.mark.usefixtures("one_forecast")
@pytest.mark.parametrize(
    ("words", "unit", "size", "layout"),
    [
        ("--microbatch 4 --lora-rank 2", "samples", 4, "padded"),
        slow("--token-budget 70 --gradient-checkpointing full --precision bf16-weights", "tokens", 70, "padded"),
        ("--gpu a100-40gb --global-batch-tokens 200", "tokens", None, "packed"),
        slow("--gpu a100-40gb --global-batch-tokens 200 --layout padded", "tokens", None, "padded"),
        slow("--gpu a100-40gb --global-batch-tokens 200 --precision float32", "tokens", None, "padded"),
    ],
)
def test_json_and_sentences_have_same_figures(
    folder: Path, words: str, unit: str, size: int | None, layout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, Any] = json.loads(planned(capfd, *SMALL, *words.split(), "--json"))
    told = "\n" + planned(capfd, *SMALL, *words.split())
    assert found["microbatch"]["unit"] == unit
    assert found["microbatch"]["size"] == size or size is None
    counted = f"{found['microbatch']['size']:,} {'tokens' if unit == 'tokens' else 'sequences'}"
    assert f"\nmicro-batches of up to {counted}: {found['microbatch']['reason']}\n" in told
    assert f"\n../base, {found['parameters']:,} parameters, " in told
    if found["trained_parameters"] != found["parameters"]:
        assert f" {found['trained_parameters']:,} of them trained, on {found['device']}\n" in told
    assert f" (phase: {found['peak_phase']}):\n" in told
    for name, num_bytes in (found["parts"] | {"total": found["peak_bytes"]}).items():
        assert re.search(rf"\n  {name} +{re.escape(describe_bytes(num_bytes))}\n", told)
    assert sum(found["parts"].values()) == found["peak_bytes"] <= found["usable_bytes"] <= found["limit_bytes"]
    first = found["first_update"]
    assert first["layout"] == layout
    counts = f"\n{first['sequences']} sequences, {first['tokens']} tokens, {layout}\n"
    assert f"{counts}{first['num_microbatches']} micro" in told
    assert (f": {first['padded_tokens']:,} tokens with padding " in told) == (layout == "padded")
    microbatches = first["microbatches"]
    assert len(microbatches) == first["num_microbatches"]
    assert sum(map(len, microbatches)) == first["sequences"]
    assert sum(map(sum, microbatches)) == first["tokens"]
    laid_out = [sum(rows) if layout == "packed" else len(rows) * max(rows) for rows in microbatches]
    assert sum(laid_out) == first["padded_tokens"]
    assert unit == "samples" or max(laid_out) <= found["microbatch"]["size"]
    assert f"{found['updates']} updates" in told
    assert (found["update_s"] is None) == (
        "the time per update was not measured: the device is not in this machine" in told
    )
    for lever in found["levers"]:
        assert re.search(rf"\n  {lever['flags']} +{re.escape(describe_bytes(lever['peak_bytes']))}  \(−", told)
    assert all(note in told for note in found["notes"])
    assert found["fits"] is True


def test_process_prints_one_object_and_nothing_else(folder: Path) -> None:
    before = files_below(folder.parent)
    done = command(*SMALL, "--json", folder=folder)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert found["microbatch"]["reason"] == "the fastest that fits"
    assert files_below(folder.parent) == before


def test_seven_billion_parameters_need_only_their_configuration(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # As many parameters as in the 32 layers of LlamaConfig(), in 2: planning them takes a sixteenth of the time.
    LlamaConfig(num_hidden_layers=2, intermediate_size=258_058).save_pretrained(folder.parent / "llama")
    words = ["--gpu", "t4", "--lora-rank", "16", "--precision", "bf16-weights", "--gradient-checkpointing"]
    printed = planned(capfd, "plan", "--data", "../data.jsonl", "--model", "../llama", *words, code=1)
    assert "../llama, 6,764,630,976 parameters, 26,215,360 of them trained, on t4, bf16-weights\n" in printed
    assert (
        "\nlengths are estimated, 4 bytes a token: the folder ../llama contains no tokenizer. Save the model's "
        "tokenizer into it with tokenizer.save_pretrained(folder).\n" in printed
    )
    assert re.search(r"\nmicro-batches of up to \d+ tokens: the longest sequence alone\n", printed)
    assert re.search(r"\n  parameters +12\.\d GiB\n", printed)
    assert re.search(r"\n  does not fit: \d\d\.\d GiB needed, 13\.1 GiB usable on t4\n", printed)
    assert "\n2 updates; the time per update was not measured: the device is not in this machine\n" in printed
    assert "\n  --quantize nf4 " in printed.partition("settings that lower the peak for the same micro-batch:")[2]


def test_single_short_document_is_described_in_singular(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder.parent / "one.jsonl", [{"text": "x"}])
    printed = planned(capfd, "plan", "--data", "../one.jsonl", "--model", "../base", "--microbatch", "1")
    assert "\nmicro-batches of up to 1 sequence: as asked\n" in printed
    assert "\n1 sequence, 2 tokens, padded\n1 micro-batch, at most 1 sequence each\n" in printed
    assert "--offload" not in printed
    assert "; 1 update: " in printed


def test_oversized_microbatch_is_reported(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = planned(capfd, *SMALL, "--memory", "1MiB", "--precision", "bf16-weights", code=1)
    assert re.search(
        r"\n  does not fit: [\d.]+ KiB needed, 0 B usable of 1MiB \(the process itself uses as much\)\n", printed
    )
    assert "; the time per update was not measured: it does not fit\n" in printed
    assert "fits:" not in printed
    assert "\n  --offload auto plans a run on a GPU that keeps training state in host memory\n" in printed


@pytest.mark.parametrize("words", [["--microbatch", "4"], ["--token-budget", "64"]])
def test_exit_code_reports_oversized_microbatch(
    folder: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["--memory", "1MiB", "--gradient-checkpointing", "--precision", "bf16-weights"]
    found = json.loads(planned(capfd, *SMALL, *words, *settings, "--json", code=1))
    assert found["fits"] is False
    assert found["microbatch"]["reason"] == "as asked"
    assert found["update_s"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_unknown_memory_is_no_failure(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    printed = planned(capfd, *SMALL, "--device", "cuda", "--microbatch", "4")
    assert "parameters, all trained, on a CUDA device, bf16\n" in printed
    assert (
        "\n  available memory is not known: pass a GPU, such as --gpu h100, or an amount, such as --memory 24GiB\n"
        in printed
    )


# what it refuses -------------------------------------------------------------------------------------------------


def refused(capfd: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The sentence that a plan ends with, which writes nothing."""
    around = Path.cwd().parent
    before = files_below(around)
    assert main([*words]) == code
    printed, complained = capfd.readouterr()
    assert all(line.endswith(" …") for line in printed.splitlines()), printed
    assert re.fullmatch(r"bigbatch plan: [^\n]+[.?]\n", complained), complained
    assert files_below(around) == before
    return complained.removeprefix("bigbatch plan: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--model ../missing",
            "there is no model folder '../missing'. Pass the folder of a model or its hub name.",
        ),
        (
            "--max-length 65",
            "--max-length 65 is more than the 64 positions of ../base: pass --max-length 64 or less.",
        ),
        (
            "--token-budget 31",
            "--token-budget 31 is less than the longest sequence, which has 32 tokens and is never cut: pass "
            "--token-budget 32 or more, or a smaller --max-length.",
        ),
        ("--device cpu --gpu t4", "--gpu t4 and --device cpu exclude each other: pass one of them."),
        ("--gpu a100-60gb", "--gpu is 'a100-60gb': it is not a known GPU; nearest are a100-40gb and a100-80gb."),
        ("--memory 1", "--memory is 1: it needs a unit, such as 1GiB."),
        (
            "--data ../nothing.txt",
            "there is no file or folder '../nothing.txt'. The built-in sources are python-stdlib and "
            "python-stdlib-functions.",
        ),
        ("--microbatch 4 --token-budget 64", "--microbatch and --token-budget exclude each other: give one of them."),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, words: str, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    given = words.split()
    model = [] if "--model" in given else ["--model", "../base"]
    data = [] if "--data" in given else ["--data", "../data.jsonl"]
    assert refused(capfd, "plan", *data, *model, *given) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "../odd has no configuration that transformers supports: It looks like the config file at "),
        ("{}", "../odd has no configuration that transformers supports: Unrecognized model in ../odd. "),
        ('{"model_type": "t5"}', "../odd is a t5 model, which is not a causal language model."),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "../odd has no configuration that "),
    ],
)
def test_invalid_configuration_is_rejected_before_reading_data(
    folder: Path, content: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "odd").mkdir()
    (folder.parent / "odd" / "config.json").write_text(content, encoding="utf-8")
    (folder.parent / "bad.jsonl").write_text("not JSON", encoding="utf-8")
    assert refused(capfd, "plan", "--data", "../bad.jsonl", "--model", "../odd").startswith(expected)


def test_unpredictable_model_fails_with_advice(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralConfig(**shape, vocab_size=300, num_local_experts=2).save_pretrained(folder.parent / "experts")
    said = refused(capfd, "plan", "--data", "../data.jsonl", "--model", "../experts", "--device", "cpu", code=1)
    assert said.startswith("the memory of ../experts cannot be predicted: the step cannot run without data (")
    assert said.endswith("). Run bigbatch train on the target machine: it finds the micro-batch by trying sizes.")


def test_plan_counts_eight_bytes_for_integer_sums(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--json", "--device", "cpu"]
    default = json.loads(planned(capfd, *words, "--microbatch", "2"))
    found = [
        json.loads(planned(capfd, *words, "--reproducible", *more))
        for more in ([], ["--microbatch", "8"], ["--token-budget", "400"])
    ]
    assert default["parts"]["gradients"] == 4 * default["trained_parameters"]
    assert [each["parts"]["gradients"] for each in found] == [8 * default["trained_parameters"]] * 3
    assert [each["microbatch"]["size"] for each in found] == [2, 2, 2]
    assert {each["peak_bytes"] - default["peak_bytes"] for each in found} == {4 * default["trained_parameters"]}
