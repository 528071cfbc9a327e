"""``bigbatch train`` as a user meets it: what it prints, what it refuses, how it stops."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from bigbatch.cli import main
from bigbatch.lm.training.trainer import Trainer
from support.command_line import LIMIT_S, SENTENCE, cold_command, command, completed, files_below, running
from support.forked_processes import ForkedProcess, script, wait_for
from support.language_models import conversations, metrics, records, save_model_folder, write_jsonl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_folder(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with data beside it."""
    write_jsonl(tmp_path / "data.jsonl", records(40))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# what it does ----------------------------------------------------------------------------------------------------


def test_main_job_runs_from_any_folder_without_terminal(tmp_path: Path) -> None:
    done = cold_command("train", "--steps", "2", "--global-batch", "4", "--validation-every", "2", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "reading python-stdlib …",
        "training a tokenizer …",
        "tokenizing python-stdlib …",
        "testing attention, layout and compilation …",
        "choosing the micro-batch …",
    ]
    assert "global batch per update: 4 sequences, about 5" in done.stdout
    assert re.search(
        r"split into (1 micro-batch of 4 sequences|\d micro-batches of up to \d+ tokens), on ", done.stdout
    )
    assert "2 updates, 0.00" in done.stdout
    assert "update 2: validation loss " in done.stdout
    assert lines[-2:] == [
        'next: bigbatch generate runs/tiny-python-stdlib "def "',
        "      bigbatch verify   checks that splitting the batch does not change the gradient",
    ]
    run = tmp_path / "runs" / "tiny-python-stdlib"
    names = {".lock", "checkpoints", "config.json", "events.jsonl", "metrics.jsonl", "microbatch.json", "model"}
    assert {path.name for path in run.iterdir()} == names | {"run-manifest.json", "samples.jsonl"}
    assert AutoTokenizer.from_pretrained(run / "model")("def ").input_ids
    assert AutoModelForCausalLM.from_pretrained(run / "model").num_parameters() > 2e6


def test_small_model_is_tuned_and_reported(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", "../data.jsonl", "--model", str(base), "--steps", "4", "--validation-every", "4"]
    assert main([*words, "--global-batch", "9", "--microbatch", "4", "--warmup-steps", "1"]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    expected = f"""\
reading ../data.jsonl …
loading {base} …
tokenizing ../data.jsonl …
testing attention, layout and compilation …
40 records in 1 file from ../data.jsonl
training data: 39 documents with """
    assert printed.startswith(expected), printed
    assert "split into 3 micro-batches of up to 4 sequences, on cpu, float32 (affects memory only" in printed
    assert "\n4 updates, 0.8 passes over 39 sequences; learning rate 2e-05, cosine decay, 1 warm-up update\n" in printed
    assert printed.count(": sample from the model\n    │ def ") == 2
    assert printed.count("unigram baseline: ") == 1
    assert "; output is in runs/small-data/\n" in printed
    assert f"bigbatch verify --data ../data.jsonl --model {base}   checks" in printed
    assert [row["step"] for row in metrics(folder / "runs" / "small-data")] == [1, 2, 3, 4]
    config = json.loads((folder / "runs" / "small-data" / "config.json").read_text(encoding="utf-8"))
    assert (config["out"], config["precision"], config["max_length"]) == ("runs/small-data", "float32", 64)


def test_repeated_command_numbers_its_folder(folder: Path, base: Path) -> None:
    words = ["train", "--data", "../data.jsonl", "--model", str(base), "--steps", "1", "--microbatch", "8"]
    assert main(words) == main(words) == 0
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["small-data", "small-data-2"]


def test_folder_that_another_run_takes_meanwhile_is_left_alone(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare = Trainer.prepare

    def take(trainer: Trainer, path: Path, **how: Any) -> None:
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        prepare(trainer, path, **how)

    monkeypatch.setattr(Trainer, "prepare", take)
    assert main(["train", "--data", "../data.jsonl", "--model", str(base), "--steps", "1"]) == 2
    (path,) = (folder / "runs").iterdir()
    assert capfd.readouterr().err == (
        f"bigbatch train: runs/{path.name} was free when this run started, and is not any more: pass --out.\n"
    )
    assert [each.name for each in path.iterdir()] == ["config.json"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no folder can be created")
def test_out_that_cannot_be_made_is_refused_before_data(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "broken.jsonl").write_text("not JSON\n")
    assert main(["train", "--data", "broken.jsonl", "--out", "/proc/run"]) == 2
    reason = "no such file or directory" if os.geteuid() == 0 else "/proc is not writable"
    assert capfd.readouterr() == ("", f"bigbatch train: --out /proc/run cannot be written: {reason}.\n")


def test_settings_file_runs_like_flags(folder: Path, base: Path) -> None:
    (folder / "run.toml").write_text(
        f'data = "../data.jsonl"\nmodel = "{base}"\nsteps = 2\nglobal_batch_tokens = 60\nmicrobatch = 2\n'
        'lora_rank = 2\nlora_targets = ["q_proj", "v_proj"]\n'
        'out = "kept"\nsample_prompt = "für 日本語"\n',
        encoding="utf-8",
    )
    assert main(["train", "--config", "run.toml", "--out", "from-file"]) == 0
    (folder / "run.toml").unlink()
    flags = ["--data", "../data.jsonl", "--model", str(base), "--steps", "2", "--global-batch-tokens", "60"]
    flags += ["--microbatch", "2", "--lora-rank", "2", "--lora-targets", "q_proj,v_proj"]
    assert main(["train", *flags, "--out", "from-flags", "--sample-prompt", "für 日本語"]) == 0
    of_file, of_flags = (
        load_file(folder / f"from-{way}/adapter/adapter_model.safetensors") for way in ("file", "flags")
    )
    assert of_file.keys() == of_flags.keys()
    assert all(torch.equal(tensor, of_flags[name]) for name, tensor in of_file.items())


@pytest.mark.parametrize("kind", ["chat", "parquet", "folder"])
def test_data_of_every_kind_trains(folder: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "chat":
        write_jsonl(folder / "chat", conversations(12)).rename(folder / "chat.jsonl")
        data = "chat.jsonl"
    elif kind == "parquet":
        data = "rows.parquet"
        datasets.Dataset.from_list(records(12)).to_parquet(folder / data)
        capfd.readouterr()  # its progress bar
    else:
        data = "notes"
        (folder / data).mkdir()
        for i in range(12):
            (folder / data / f"{i}.md").write_text(f"# Größe {i}\n\nПривет, 日本語 {i}\n", encoding="utf-8")
    assert main(["train", "--data", data, "--steps", "1", "--microbatch", "100", "--out", "run"]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    assert "micro-batch of " in printed
    assert metrics(folder / "run")[0]["num_microbatches"] == 1


def test_counts_of_one_are_singular(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "one.jsonl", records(1))
    assert main(["train", "--data", "one.jsonl", "--model", str(base), "--out", "run it"]) == 0
    printed = capfd.readouterr().out
    assert "global batch per update: 1 sequence (the whole data set; 32 requested), about " in printed
    assert "split into 1 micro-batch of 1 sequence, on " in printed
    assert "1 update, 1 pass over 1 sequence; learning rate 2e-05, cosine decay, no warm-up" in printed
    assert "1 update in " in printed
    assert "next: bigbatch generate 'run it' \"def \"" in printed


def test_epoch_of_mixture_has_one_length(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "few.jsonl", [{"text": f"a longer sentence, number {i}, about few things"} for i in range(9)])
    words = ["train", "--data", "../data.jsonl", "few.jsonl", "--data-weights", "0.2", "0.8", "--model", str(base)]
    assert main([*words, "--epochs", "1", "--global-batch", "100", "--microbatch", "100", "--out", "run"]) == 0
    printed = capfd.readouterr().out
    found = re.search(r"an epoch is one pass over ../data.jsonl, (\d+) sequences\n", printed)
    trained = re.search(r"training data: .*; (\d+) sequences\n", printed)
    assert found is not None
    assert trained is not None
    assert int(found[1]) > int(trained[1])  # some of few.jsonl are trained on again
    updates = -(-int(found[1]) // 100)
    word = "update" if updates == 1 else "updates"
    assert f"\n{updates} {word}, 1 epoch of {found[1]} sequences; learning rate " in printed


def test_dropout_replaces_promise_about_split(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model_folder(folder / "drops", kind="gpt2", dropout=0.1)
    words = ["train", "--data", "../data.jsonl", "--model", "drops", "--steps", "1", "--microbatch", "8"]
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert (
        "split into 4 micro-batches of 8 sequences, on cpu, float32 (the model has dropout, whose random numbers, and "
        "so the result, depend on the split)\n" in printed
    )
    assert "not the result" not in printed


def test_mixture_of_experts_says_how_it_is_trained(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=308, num_local_experts=2, router_aux_loss_coef=0.5, max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "experts")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "experts")
    capfd.readouterr()
    words = ["train", "--data", "../data.jsonl", "--model", "experts", "--steps", "1", "--microbatch", "8"]
    assert main([*words, "--lora-rank", "2"]) == 0
    printed, complained = capfd.readouterr()
    assert complained == ""
    assert (
        "\nthe load-balancing loss of the experts has weight 0.5 of the model, over the whole batch of each update: "
        "every sequence runs one forward more (--router-aux-loss microbatch avoids it, for another loss; "
        "--router-aux-loss-coef 0 leaves the loss out)\nLoRA adapts 2 of 2 expert weights, 1 of 1 router and "
        "4 of 4 other linear layers\n" in printed
    )


def test_hub_folder_trains_on_its_training_split(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "set" / "data").mkdir(parents=True)
    (folder / "set" / "README.md").write_text("---\nlicense: mit\n---\nAbout the data.\n", encoding="utf-8")
    write_jsonl(folder / "set" / "data" / "train-00000-of-00001.jsonl", records(20))
    write_jsonl(folder / "set" / "data" / "test-00000-of-00001.jsonl", records(30))
    words = ["train", "--data", "set", "--model", str(base), "--steps", "1", "--validation-fraction", "0"]
    assert main([*words, "--microbatch", "8"]) == 0
    printed = capfd.readouterr().out
    assert "\n20 records in 1 file from set\n" in printed
    assert (
        "\nset is laid out like a dataset of the hub: only 1 file of the split train is used, not README.md, "
        "data/test-00000-of-00001.jsonl\n" in printed
    )


def test_full_stdout_does_not_end_run(folder: Path, base: Path) -> None:
    words = ["train", "--data", "../data.jsonl", "--model", str(base), "--steps", "2", "--out", "run"]
    done = completed(bigbatch_on_full_stdout, *words, "--microbatch", "8", folder=folder)
    assert done.returncode == 0
    assert done.stderr == (
        "bigbatch train: stdout cannot be written (no space left on device): the run continues without output. Its "
        "updates are in metrics.jsonl in the run directory.\n"
    )
    assert [row["step"] for row in metrics(folder / "run")] == [1, 2]


def bigbatch_on_full_stdout(*words: str) -> int:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    return main(list(words))


# what it refuses -------------------------------------------------------------------------------------------------


def bad(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder.parent / name).write_bytes(content) and None


REFUSED: list[tuple[str, Callable[[Path], None] | None, str, str]] = [
    ("unknown flag", None, "--global-bach 3", r"unknown flag --global-bach: did you mean --global-batch\?"),
    ("flag from elsewhere", None, "--batch-size 3", r"unknown flag --batch-size: did you mean --global-batch\?"),
    (
        "unknown key",
        bad("run.toml", b"globl_batch = 3\n"),
        "--config ../run.toml",
        r"../run\.toml has the unknown key 'globl_batch': did you mean 'global_batch'\?",
    ),
    (
        "missing data",
        None,
        "--data ../dta.jsonl",
        r"there is no file or folder '\.\./dta\.jsonl'\. Did you mean \.\./data\.jsonl\?",
    ),
    ("empty data", bad("e.jsonl", b""), "--data ../e.jsonl", r"\.\./e\.jsonl is empty.*"),
    ("empty text", bad("e.txt", b" \n"), "--data ../e.txt", r"\.\./e\.txt .*yields no training token.*"),
    (
        "not UTF-8",
        bad("l.txt", b"gr\xf6\xdfe"),
        "--data ../l.txt",
        r"\.\./l\.txt is not UTF-8: byte 0xf6 at offset 2.*",
    ),
    (
        "broken JSONL",
        bad("b.jsonl", b'{"text": "a"}\n{"text": \n'),
        "--data ../b.jsonl",
        r"\.\./b\.jsonl:2: not valid JSON: .*",
    ),
    (
        "other fields",
        bad("o.jsonl", b'{"txt": "a"}\n'),
        "--data ../o.jsonl",
        r"\.\./o\.jsonl:1: the record has 'txt'\. A record must have 'text', or 'prompt' and "
        r"'completion', or 'messages', .*",
    ),
    (
        "nothing to learn",
        bad("n.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": ""}\n'),
        "--data ../n.jsonl",
        r"\.\./n\.jsonl:2: the record yields no training token: its completion is empty\. Pass --skip-broken to .*",
    ),
    ("batch 0", None, "--global-batch 0", r"--global-batch is 0: it must be at least 1\."),
    ("negative batch", None, "--global-batch -4", r"--global-batch is -4: it must be at least 1\."),
    ("microbatch 0", None, "--microbatch 0", r"--microbatch is 0: it must be at least 1\."),
    (
        "warm-up longer than the run",
        None,
        "--epochs 1 --warmup-steps 9",
        r"--warmup-steps 9 is more than the 2 updates of the run: .*",
    ),
    (
        "other run",
        lambda folder: (folder.parent / "old").mkdir() or (folder.parent / "old" / "config.json").touch(),
        "--out ../old",
        r"--out \.\./old holds another run: name a new or empty folder, or continue it: bigbatch "
        r"resume \.\./old\.",
    ),
    (
        "out below a file",
        None,
        "--out ../data.jsonl/run",
        r"--out \.\./data\.jsonl/run cannot be written: .*is a file\.",
    ),
    ("out is a file", None, "--out ../data.jsonl", r"--out \.\./data\.jsonl is a file: name a new or empty folder\."),
    (
        "no tokenizer",
        lambda folder: [path.unlink() for path in (folder.parent / "m").glob("tokenizer*")] and None,
        "--model ../m",
        r"the folder \.\./m contains no tokenizer\. Save the model's tokenizer .*",
    ),
    (
        "broken weights",
        lambda folder: (folder.parent / "m" / "model.safetensors").write_bytes(b"nothing") and None,
        "--model ../m",
        r"\.\./m does not load as a causal language model: .*",
    ),
    ("no such model", None, "--model ../nothing", r".*\.\./nothing.*"),
    ("device", None, "--device cuda:7", r"--device cuda:7 is not available: .*"),
    ("device name", None, "--device tpu", r"--device is 'tpu': it must be auto, cpu, cuda, cuda:N or mps\."),
    ("precision", None, "--precision int4", r"--precision is 'int4': it must be auto, float32, .*"),
    ("long sample prompt", None, f"--sample-prompt {'☃' * 40}", r"--sample-prompt has \d+ tokens and the model .*"),
]


def check_refusal(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert done.returncode == 2, done.stderr
    assert SENTENCE.fullmatch(done.stderr), done.stderr
    assert re.fullmatch(f"bigbatch train: {expected}\n", done.stderr), done.stderr
    assert all(line.endswith(" …") for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize(
    ("spoil", "words", "expected"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_bad_input_is_one_sentence_without_files(
    folder: Path,
    base: Path,
    spoil: Callable[[Path], None] | None,
    words: str,
    expected: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if device_is_there(words):
        pytest.skip("this machine has the device")
    shutil.copytree(base, folder.parent / "m")
    if spoil is not None:
        spoil(folder)
    before = files_below(folder.parent)
    given = words.split()
    given += [
        word
        for flag in ("--data ../data.jsonl", "--model ../m")
        if flag.split()[0] not in given
        for word in flag.split()
    ]
    code = main(["train", *given])
    printed, complained = capfd.readouterr()
    check_refusal(subprocess.CompletedProcess([], code, printed, complained), expected)
    assert files_below(folder.parent) == before


def device_is_there(words: str) -> bool:
    return "cuda:7" in words and torch.cuda.device_count() > 7


@pytest.mark.parametrize("case", ["unknown flag", "broken JSONL", "out below a file", "broken weights"])
def test_process_rejects_like_its_function(folder: Path, base: Path, case: str) -> None:
    spoil, words, expected = next(found[1:] for found in REFUSED if found[0] == case)
    shutil.copytree(base, folder.parent / "m")
    if spoil is not None:
        spoil(folder)
    before = files_below(folder.parent)
    given = [] if "--data" in words else ["--data", "../data.jsonl"]
    check_refusal(command("train", *given, *words.split(), folder=folder), expected)
    assert files_below(folder.parent) == before


# how it stops ----------------------------------------------------------------------------------------------------


def long_run(base: Path) -> list[str]:
    words = ["train", "--data", "../data.jsonl", "--model", str(base), "--out", "run"]
    return [*words, "--epochs", "100000", "--global-batch", "4", "--microbatch", "4", "--validation-fraction", "0"]


def has_a_line(folder: Path) -> bool:
    path = folder / "run" / "metrics.jsonl"
    return path.exists() and b"\n" in path.read_bytes()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_signal_ends_run_after_update_and_saves(folder: Path, base: Path, number: int, name: str) -> None:
    with running(*long_run(base), folder=folder) as process:
        wait_for(process, lambda: has_a_line(folder))
        process.send_signal(number)
        printed, complained = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert complained == "\nstopping after this update, then saving; signal again to stop immediately\n"
    rows = metrics(folder / "run")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert f"stopped by {name} after update {len(rows)} of 1000000; the model is saved\n" in printed
    assert f"{len(rows)} update" in printed
    assert "output is in run/\n" in printed
    assert AutoModelForCausalLM.from_pretrained(folder / "run" / "model").config.vocab_size == 308


def test_second_signal_ends_run_immediately(folder: Path, base: Path) -> None:
    hold = folder.parent / "hold"
    os.mkfifo(hold)
    # Saving waits for the other end of a pipe, so that the second signal comes in the middle of it for sure.
    waiting = (
        "import sys, bigbatch.lm.training.model_saver as saver;"
        "saver.save_model = lambda *_, **__: open('../hold').read();"
        "from bigbatch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with ForkedProcess(script, waiting, *long_run(base)) as process:
        wait_for(process, lambda: has_a_line(folder))
        process.send_signal(signal.SIGINT)
        writer = open_when_read(process, hold)
        process.send_signal(signal.SIGINT)
        os.close(writer)  # if the signal came between two system calls, the read ends and it is handled then
        _, complained = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert complained.endswith("\n\nbigbatch train: interrupted.\n")
    assert not (folder / "run" / "model").exists()


def open_when_read(process: ForkedProcess, pipe: Path) -> int:
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            assert process.poll() is None
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)


def test_ctrl_c_during_setup_leaves_no_files(folder: Path, base: Path) -> None:
    hold = folder.parent / "hold"
    os.mkfifo(hold)
    # Reading the data waits for the other end of a pipe, so that the signal comes in the middle of the set-up for sure.
    waiting = (
        "import sys, bigbatch.lm.training.data as data;"
        "data.open_sources = lambda *_, **__: open('../hold').read();"
        "from bigbatch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "--model", str(base), "--out", "run"]
    with ForkedProcess(script, waiting, *words) as process:
        writer = open_when_read(process, hold)
        process.send_signal(signal.SIGINT)
        os.close(writer)
        printed, complained = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, complained) == (130, "\nbigbatch train: interrupted.\n")
    assert all(line.endswith(" …") for line in printed.splitlines())
    assert files_below(folder) == set()


# what comes next ----------------------------------------------------------------------------------------------------


def test_next_lines_suit_model_and_data(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_jsonl(folder / "chats.jsonl", conversations(20))
    words = ["train", "--model", str(base), "--steps", "1", "--microbatch", "4"]
    assert main([*words, "--data", "chats.jsonl", "--out", "chat"]) == 0
    assert capfd.readouterr().out.splitlines()[-3:-1] == [
        'next: bigbatch generate chat --chat "Hello"',
        "      python convert_hf_to_gguf.py chat/model   of llama.cpp, writes a GGUF file",
    ]
    assert main([*words, "--data", "../data.jsonl", "--out", "text"]) == 0
    assert capfd.readouterr().out.splitlines()[-3] == 'next: bigbatch generate text "def "'
    split = ["--data", "chats.jsonl", "--chat-template", "chatml", "--max-length", "64", "--lora-rank", "2"]
    assert main([*words, *split, "--out", "split"]) == 0
    assert capfd.readouterr().out.splitlines()[-4:-2] == [
        'next: bigbatch generate split --chat "Hello"',
        "      bigbatch merge split --out split-merged   writes the model with its adapters",
    ]
