import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

import bigbatch
from bigbatch.cli import COMMANDS, main
from bigbatch.cli.arguments import POSITIONAL_NAMES, help_text, parse
from bigbatch.cli.command_specs import COMMAND_SPECS
from bigbatch.cli.options import GenerateOptions, PlanOptions, VerifyOptions
from bigbatch.errors import InputError
from bigbatch.lm.config.error_messages import FOREIGN_NAMES
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.config.train_fields import DEFAULT_STEPS


def config_of(*words: str) -> TrainConfig:
    (config,) = parse("train", words)
    assert isinstance(config, TrainConfig)
    return config


def complaint(command: str, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(command, words)
    return str(caught.value)


def write(folder: Path, text: str | bytes, name: str = "run.toml") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder, so that messages hold short paths and stray files show."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# what is understood ----------------------------------------------------------------------------------------------


def test_no_arguments_give_defaults():
    assert parse("train", []) == (TrainConfig(),)
    assert parse("plan", []) == (TrainConfig(), PlanOptions())
    assert parse("verify", []) == (TrainConfig(), VerifyOptions())


def test_flags_of_every_kind_reach_their_fields():
    config = config_of(
        *("--global-batch=512", "--lr", "1e-3", "--precision", "bf16", "--out", "runs/a", "--max-grad-norm", "none"),
        *("--sample-prompt", "-x = 3"),
    )
    assert config == TrainConfig(
        global_batch=512, lr=1e-3, precision="bf16", out=Path("runs/a"), max_grad_norm=None, sample_prompt="-x = 3"
    )


def test_microbatch_size_has_several_flags():
    assert config_of("--microbatch", "Auto") == TrainConfig(microbatch="auto")
    assert config_of("--microbatch=4", "--memory", "80%") == TrainConfig(microbatch=4, memory="80%")
    assert config_of("--memory", "24 GiB").memory == "24 GiB"
    config = config_of("--token-budget", "4096", "--gpu", "A100-40GB", "--gradient-checkpointing", "--steps", "3")
    assert config == TrainConfig(token_budget=4096, gpu="a100-40gb", gradient_checkpointing=True, steps=3)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("Tesla V100-SXM2-32GB", "v100-32gb"), ("v100", "v100-16gb")],
)
def test_gpu_accepts_names_of_nvidia_smi(name: str, gpu: str):
    assert config_of("--gpu", name).gpu == gpu


def test_value_may_contain_equals_sign():
    assert config_of("--sample-prompt=x = 3").sample_prompt == "x = 3"
    assert config_of("--sample-prompt=--x").sample_prompt == "--x"
    assert config_of("--sample-prompt=").sample_prompt == ""


def test_verify_accepts_train_flags_and_its_own():
    config, options = parse("verify", ["--cuts", "1, 2,4", "--json", "--samples", "4", "--model", "gpt2"])
    assert config == TrainConfig(model="gpt2")
    assert options == VerifyOptions.model_validate({"cuts": (1, 2, 4), "samples": 4, "json": True})
    assert isinstance(options, VerifyOptions)
    assert options.as_json


def test_plan_accepts_train_flags_and_its_own():
    config, options = parse("plan", ["--gpu", "h100", "--json", "--out", "runs/a", "--global-batch", "512"])
    assert config == TrainConfig(gpu="h100", out=Path("runs/a"), global_batch=512)
    assert options == PlanOptions.model_validate({"json": True})
    assert isinstance(options, PlanOptions)
    assert options.as_json


def test_generate_arguments_may_have_any_order():
    expected = (GenerateOptions(run=Path("runs/a"), prompt="class ", seed=3),)
    assert parse("generate", ["runs/a", "class ", "--seed", "3"]) == expected
    assert parse("generate", ["runs/a", "--seed", "3", "class "]) == expected
    assert parse("generate", ["--seed", "3", "runs/a", "class "]) == expected
    assert parse("generate", ["runs/a"]) == (GenerateOptions(run=Path("runs/a"), prompt="def "),)
    assert parse("generate", ["runs/a", "--", "--x"]) == (GenerateOptions(run=Path("runs/a"), prompt="--x"),)


def test_file_sets_values_and_flags_win(folder: Path):
    write(folder, 'global_batch = 32\nlr = 1\nmax_grad_norm = "none"\nschedule = "constant"\n')
    config = config_of("--config", "run.toml", "--lr", "0.5")
    assert config == TrainConfig(global_batch=32, lr=0.5, max_grad_norm=None, schedule="constant")


def test_file_may_have_bom_and_windows_line_ends(folder: Path):
    write(folder, b"\xef\xbb\xbfsteps = 3\r\nseed = 4\r\n")
    assert config_of("--config=run.toml") == TrainConfig(steps=3, seed=4)


def test_flag_overrides_alternative_setting_in_file(folder: Path):
    write(folder, "global_batch = 32\nsteps = 10\n")
    config = config_of("--config", "run.toml", "--global-batch-tokens", "4096", "--epochs", "2")
    assert config == TrainConfig(global_batch_tokens=4096, epochs=2)
    write(folder, 'microbatch = "auto"\nmemory = "24GiB"\n')
    config = config_of("--config", "run.toml", "--token-budget", "4096", "--gpu", "t4")
    assert config == TrainConfig(token_budget=4096, gpu="t4")


def test_file_sets_memory_and_switches(folder: Path):
    write(folder, 'microbatch = 4\nmemory = "80%"\ngradient_checkpointing = true\n')
    assert config_of("--config", "run.toml") == TrainConfig(microbatch=4, memory="80%", gradient_checkpointing="full")
    write(folder, 'token_budget = 4096\ngpu = "h100"\ngradient_checkpointing = false\n')
    config = config_of("--config", "run.toml")
    assert config == TrainConfig(token_budget=4096, gpu="h100", gradient_checkpointing="none")
    assert config_of("--config", "run.toml", "--gradient-checkpointing").gradient_checkpointing == "full"
    write(folder, 'gradient_checkpointing = "selective"\nlayout = "packed"\ncompile = "layers"\n')
    config = config_of("--config", "run.toml", "--compile", "none")
    assert config == TrainConfig(gradient_checkpointing="selective", layout="packed", compile="none")


@pytest.mark.parametrize("words", ["", "--gradient-checkpointing auto", "--layout auto --compile auto"])
def test_explicit_auto_equals_default(words: str):
    assert config_of(*words.split()) == TrainConfig()


@pytest.mark.parametrize(
    "words",
    [
        "--gradient-checkpointing",
        "--gradient-checkpointing --steps 3",
        "--gradient-checkpointing full",
        "--gradient-checkpointing=full",
    ],
)
def test_checkpointing_without_value_is_full(words: str):
    assert config_of(*words.split()).gradient_checkpointing == "full"


def test_accumulation_steps_set_microbatch(folder: Path):
    assert config_of("--gradient-accumulation-steps", "4").microbatch == 8
    assert config_of("--global-batch", "10", "--gradient-accumulation-steps", "4").microbatch == 3
    assert config_of("--global-batch", "2", "--gradient-accumulation-steps", "4").microbatch == 1
    write(folder, "global_batch = 100\nmicrobatch = 1\n")
    assert config_of("--config", "run.toml", "--gradient-accumulation-steps", "2").microbatch == 50
    write(folder, "global_batch = 100\ntoken_budget = 4096\n")
    config = config_of("--config", "run.toml", "--gradient-accumulation-steps", "2")
    assert (config.microbatch, config.token_budget) == (50, None)


# what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--global-batch 0", "--global-batch is 0: it must be at least 1."),
        ("--global-batch=-3", "--global-batch is -3: it must be at least 1."),
        ("--global-batch -3", "--global-batch is -3: it must be at least 1."),
        ("--global-batch 2.5", "--global-batch is 2.5: it must be a whole number."),
        ("--global-batch many", "--global-batch is 'many': it must be a whole number."),
        ("--global-batch 3000000000", "--global-batch is 3000000000: it must be at most 2147483647."),
        ("--global-batch= --steps 3", "--global-batch is '': it must be a whole number."),
        ("--microbatch 0", "--microbatch is 0: it must be at least 1."),
        ("--microbatch -1", "--microbatch is -1: it must be at least 1."),
        ("--microbatch 2.5", "--microbatch is 2.5: it must be auto or a whole number."),
        ("--microbatch fast", "--microbatch is 'fast': it must be auto or a whole number."),
        ("--microbatch=", "--microbatch is '': it must be auto or a whole number."),
        ("--microbatch 3000000000", "--microbatch is 3000000000: it must be at most 2147483647."),
        ("--microbatch", "--microbatch needs a value: --microbatch auto|N."),
        ("--token-budget 0", "--token-budget is 0: it must be at least 1."),
        ("--token-budget auto", "--token-budget is 'auto': it must be a whole number."),
        (
            "--microbatch auto --token-budget 4096",
            "--microbatch and --token-budget exclude each other: give one of them.",
        ),
        ("--memory 24", "--memory is 24: it needs a unit, such as 24GiB."),
        ("--memory 0GiB", "--memory is '0GiB': it must be more than 0, such as 24GiB or 80%."),
        ("--memory -24GiB", "--memory is '-24GiB': it must be more than 0, such as 24GiB or 80%."),
        ("--memory 120%", "--memory is '120%': a share must be at most 100%, such as 80%."),
        ("--memory 24XB", "--memory is '24XB': its unit must be KiB, MiB, GiB, TiB or %, such as 24GiB."),
        ("--memory nan", "--memory is nan: it must be an amount such as 24GiB or a share such as 80%."),
        ("--memory=", "--memory is '': it must be an amount such as 24GiB or a share such as 80%."),
        ("--memory {}", "--memory is '{}': it must be an amount such as 24GiB or a share such as 80%."),
        ("--memory", "--memory needs a value: --memory MEMORY."),
        ("--gpu h20", "--gpu is 'h20': it is not a known GPU; nearest is h200."),
        ("--gpu voodoo", "--gpu is 'voodoo': it is not a known GPU; pass its memory instead, such as 24GiB."),
        ("--memory 24GiB --gpu t4", "--memory and --gpu exclude each other: give one of them."),
        (
            "--gradient-checkpointing=true",
            "--gradient-checkpointing is 'true': it must be auto, none, selective, full or offload.",
        ),
        (
            "--gradient-checkpointing true",
            "--gradient-checkpointing is 'true': it must be auto, none, selective, full or offload.",
        ),
        (
            "--gradient-checkpointing=",
            "--gradient-checkpointing is '': it must be auto, none, selective, full or offload.",
        ),
        ("--layout dense", "--layout is 'dense': it must be auto, padded or packed."),
        ("--layout", "--layout needs a value: --layout auto|padded|packed."),
        ("--compile true", "--compile is 'true': it must be auto, none, layers or graphs."),
        ("--compile --steps 3", "--compile needs a value: --compile auto|none|layers|graphs."),
        ("--lora-alpha 8", "--lora-alpha does nothing without --lora-rank: give both."),
        ("--lora-targets q_proj", "--lora-targets does nothing without --lora-rank: give both."),
        ("--rslora", "--rslora does nothing without --lora-rank: give both."),
        (
            "--lora-rank 2 --lora-targets q_proj,,v_proj",
            "--lora-targets is 'q_proj,,v_proj': each name in it must not be empty.",
        ),
        (
            "--lora-rank 2 --lora-targets q_proj,q_proj",
            "--lora-targets is 'q_proj,q_proj': it must name each layer once.",
        ),
        (
            "--lora-rank 2 --lora-targets all-linear,q_proj",
            "--lora-targets is 'all-linear,q_proj': all-linear includes every other name: give one or the other.",
        ),
        ("--lora-rank 2 --lora-dropout 1", "--lora-dropout is 1: it must be less than 1."),
        ("--use-dora", "unknown flag --use-dora: did you mean --dora?"),
        ("--lora-r 16", "unknown flag --lora-r: did you mean --lora-rank?"),
        (
            "--steps 3 --warmup-steps 4",
            "--warmup-steps is more than --steps: the learning rate would never reach its peak.",
        ),
        ("--lr-rule sde", "--lr-rule does nothing without --scale-from: give both."),
        ("--quantum 2", "--quantum does nothing without --reproducible: give both."),
        (
            "--reproducible --parallel fsdp",
            "--reproducible needs whole gradients on every rank, which --parallel fsdp and hsdp shard: use ddp.",
        ),
        (
            "--gradient-checkpointing offload --compile graphs",
            "--gradient-checkpointing offload excludes --compile graphs: use layers or none.",
        ),
        (
            "--reproducible --precision fp16",
            "--reproducible adds gradients in float32 or bfloat16, not those of --precision fp16: use bf16 or float32.",
        ),
        (
            "--reproducible --compile graphs",
            "--reproducible excludes --compile graphs, which do not capture quanta: use layers or none.",
        ),
        (
            "--reproducible --microbatch 3",
            "--microbatch 3 is no whole number of quanta: pass a multiple of --quantum, 2.",
        ),
        ("--scale-from 0 --lr-rule sde", "--scale-from is 0: it must be at least 1."),
        (
            "--scale-from 8 --lr-rule cubic",
            "--lr-rule is 'cubic': it must be none, linear, sqrt, sde, half-life or sqrt+half-life.",
        ),
        (
            "--scale-from 8 --lr-rule adascale",
            "--lr-rule is 'adascale': it is derived for SGD and needs a measured noise scale, which bigbatch train "
            'does not pass to it: in your own loop, call bigbatch.rescale(optimizer, factor, rule="adascale", '
            "noise_scale=N, batch=B).",
        ),
        (
            "--scale-from 8 --lr-rule sde --global-batch 128",
            "--lr-rule sde at 16 times the batch of --scale-from would make beta1 -0.6, which is below 0: the nearest "
            "--scale-from that works is 13.",
        ),
        ("--steps 3 --lr 1 --steps=4", "--steps is given twice, as 3 and 4: give it once."),
        ("--seed 1 --seed 1", "--seed is given twice, as 1 and 1: give it once."),
        (
            "--gradient-checkpointing none --gradient-checkpointing",
            "--gradient-checkpointing is given twice, as 'none' and 'full': give it once.",
        ),
        ("--async-checkpoint --steps 3 --async-checkpoint", "--async-checkpoint is given twice: give it once."),
        ("--lr fast", "--lr is 'fast': it must be a number."),
        ("--lr=fast", "--lr is 'fast': it must be a number."),
        ("--lr 0", "--lr is 0: it must be more than 0."),
        ("--lr -1e-3", "--lr is -1e-3: it must be more than 0."),
        ("--lr nan", "--lr is nan: it must be a finite number."),
        ("--lr inf", "--lr is inf: it must be a finite number."),
        ("--validation-fraction 1", "--validation-fraction is 1: it must be less than 1."),
        ("--seed -1", "--seed is -1: it must be at least 0."),
        ("--schedule step", "--schedule is 'step': it must be cosine, linear, wsd or constant."),
        ("--optimizer adam", "--optimizer is 'adam': it must be adamw, adamw-8bit, muon, lion, adafactor or sgd."),
        ("--optimizer sgd", "--optimizer sgd has no default learning rate: pass --lr."),
        (
            "--precision bf61",
            "--precision is 'bf61': it must be auto, float32, float64, bf16, bf16-weights, fp16 or fp8.",
        ),
        ("--device gpu", "--device is 'gpu': it must be auto, cpu, cuda, cuda:N or mps."),
        ("--max-grad-norm -1", "--max-grad-norm is -1: it must be at least 0."),
        ("--out=", "--out is '': it must not be empty."),
        ("--data=", "--data contains '': it must not be empty."),
        ("--data \udcff", r"--data contains '\udcff': it must be valid UTF-8 text."),
        ("--sample-prompt \udcff", r"--sample-prompt is '\udcff': it must be valid UTF-8 text."),
        ("--lr", "--lr needs a value: --lr X."),
        ("--lr --steps 3", "--lr needs a value: --lr X."),
        ("--config", "--config needs a value: --config FILE."),
        ("--precision", "--precision needs a value: --precision auto|float32|float64|bf16|bf16-weights|fp16|fp8."),
        ("--global-batc 3", "unknown flag --global-batc: did you mean --global-batch?"),
        ("--global-batc=3", "unknown flag --global-batc: did you mean --global-batch?"),
        ("--global 3", "unknown flag --global: did you mean --global-batch?"),
        ("--global_batch 3", "unknown flag --global_batch: did you mean --global-batch?"),
        ("--learning-rate 3", "unknown flag --learning-rate: did you mean --lr?"),
        ("--max-tokens 3", "unknown flag --max-tokens: did you mean --token-budget?"),
        ("--batch-tokens 3", "unknown flag --batch-tokens: did you mean --token-budget?"),
        ("--auto-find-batch-size", "unknown flag --auto-find-batch-size: did you mean --microbatch?"),
        ("--gpu-memory 3", "unknown flag --gpu-memory: did you mean --memory?"),
        ("--vram 3", "unknown flag --vram: did you mean --memory?"),
        (
            "--activation-checkpointing",
            "unknown flag --activation-checkpointing: did you mean --gradient-checkpointing?",
        ),
        ("-lr 3", "unknown flag -lr: did you mean --lr?"),
        ("--hlp", "unknown flag --hlp: did you mean --help?"),
        ("--zzz 3", "unknown flag --zzz: see bigbatch train --help."),
        ("texts", "unexpected argument 'texts': train accepts flags only. Pass data as --data texts."),
        ("--steps 3 texts", "unexpected argument 'texts': train accepts flags only. Pass data as --data texts."),
        ("-- texts", "unexpected argument 'texts': train accepts flags only. Pass data as --data texts."),
        ("--steps 3 --epochs 2", "--steps and --epochs exclude each other: give one of them."),
        (
            "--global-batch 3 --global-batch-tokens 2",
            "--global-batch and --global-batch-tokens exclude each other: give one of them.",
        ),
        (
            "--gradient-accumulation-steps 0",
            "--gradient-accumulation-steps is 0: it must be at least 1.",
        ),
        (
            "--gradient-accumulation-steps 2 --microbatch 4",
            "--gradient-accumulation-steps and --microbatch exclude each other: give one of them.",
        ),
        (
            "--gradient-accumulation-steps 2 --token-budget 4096",
            "--gradient-accumulation-steps and --token-budget exclude each other: give one of them.",
        ),
        (
            "--gradient-accumulation-steps 2 --global-batch-tokens 4",
            "--gradient-accumulation-steps needs a batch in sequences: pass --global-batch, "
            "or --microbatch with --global-batch-tokens.",
        ),
    ],
)
def test_train_errors_are_one_sentence(words: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *words.split(" ")]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"bigbatch train: {expected}\n"
    assert printed.out == ""
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("verify", ["--json=yes"], "--json is a switch and accepts no value."),
        ("verify", ["--json", "yes"], "unexpected argument 'yes': verify accepts flags only."),
        ("verify", ["--cuts", "1,x"], "--cuts contains 'x': it must be a whole number."),
        ("verify", ["--cuts", "1,0"], "--cuts contains 0: it must be at least 1."),
        ("verify", ["--cut", "1"], "unknown flag --cut: did you mean --cuts?"),
        ("verify", ["--samples", "0"], "--samples is 0: it must be at least 1."),
        ("verify", ["--cuts", "1,2", "--cuts", "4"],
         "--cuts is given twice, as '1,2' and 4: give one list, such as --cuts 1,2,4."),
        ("bench", ["--only", "bigbatch", "--json", "--only=trainer:4"],
         "--only is given twice, as 'bigbatch' and 'trainer:4': give one list, such as --only bigbatch,trainer:4."),
        ("report", ["a", "--watch", "--watch"], "--watch is given twice: give it once."),
        ("resume", ["a", "--memory", "1GiB", "--memory", "2GiB"],
         "--memory is given twice, as '1GiB' and '2GiB': give it once."),
        ("resume", ["a", "--steps", "9"],
         "--steps cannot be changed, a resumed run keeps it: start a new run with bigbatch train."),
        ("resume", ["a", "--global-batc", "9"], "unknown flag --global-batc: did you mean --global-batch?"),
        ("verify", ["--lr", "x"], "--lr is 'x': it must be a number."),
        ("plan", ["--json=yes"], "--json is a switch and accepts no value."),
        ("plan", ["--memory", "24"], "--memory is 24: it needs a unit, such as 24GiB."),
        ("plan", ["--cuts", "1"], "unknown flag --cuts: see bigbatch plan --help."),
        ("train", ["--json"], "unknown flag --json: see bigbatch train --help."),
        ("train", ["--cuts", "1"], "unknown flag --cuts: see bigbatch train --help."),
        ("generate", [], "RUN is missing: pass the directory of a run, such as runs/tiny-python-stdlib."),
        ("generate", [""], "RUN is '': it must not be empty."),
        ("generate", ["a", "b", "c"], "unexpected argument 'c': generate accepts RUN and one PROMPT (in "
         "quotes if it contains spaces)."),
        ("generate", ["a", "--temperature", "-1"], "--temperature is -1: it must be at least 0."),
        ("generate", ["a", "--top-k", "x"], "--top-k is 'x': it must be a whole number."),
        ("inspect", ["--data", "a.jsonl"],
         "unknown flag --data: pass the data without it, as in bigbatch inspect FILE."),
        ("generate", ["a", "--run", "b"], "unknown flag --run: see bigbatch generate --help."),
        ("generate", ["a", "\0"], r"PROMPT is '\x00': it must not contain a NUL character."),
    ],
)  # fmt: skip
def test_verify_and_generate_report_errors_equally(command: str, words: list[str], expected: str):
    assert complaint(command, *words) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lerning_rate = 1", "run.toml has the unknown key 'lerning_rate': did you mean 'lr'?"),
        ("per_device_train_batch_size = 1", "run.toml has the unknown key 'per_device_train_batch_size': did you mean "
         "'microbatch'?"),
        ("global-batch = 1", "run.toml has the unknown key 'global-batch': did you mean 'global_batch'?"),
        ("zzz = 1", "run.toml has the unknown key 'zzz': see bigbatch train --help."),
        ("gradient_accumulation_steps = 1", "run.toml has the unknown key 'gradient_accumulation_steps': "
         "see bigbatch train --help."),
        ("[batch]\nglobal_batch = 1", "run.toml has the table [batch]: write the settings at the top "
         "level, without tables."),
        ("[lr]\nvalue = 1", "lr in run.toml is a table: it must be a number."),
        ("lr = [1]", "lr in run.toml is a list: it must be a number."),
        ('lr = "fast"', "lr in run.toml is 'fast': it must be a number."),
        ("lr = nan", "lr in run.toml is nan: it must be a finite number."),
        ("lr = true", "lr in run.toml is true: it must be a number."),
        ("global_batch = true", "global_batch in run.toml is true: it must be a number."),
        ("global_batch = 2.5", "global_batch in run.toml is 2.5: it must be a whole number."),
        ("global_batch = 0", "global_batch in run.toml is 0: it must be at least 1."),
        ("microbatch = true", "microbatch in run.toml is true: it must be auto or a whole number."),
        ('microbatch = "fast"', "microbatch in run.toml is 'fast': it must be auto or a whole number."),
        ("microbatch = 0", "microbatch in run.toml is 0: it must be at least 1."),
        ("microbatch = 4\ntoken_budget = 4096", "microbatch in run.toml and token_budget in run.toml exclude each "
         "other: give one of them."),
        ("memory = 24", "memory in run.toml is 24: it needs a unit, such as 24GiB."),
        ("memory = 24.5", "memory in run.toml is 24.5: it needs a unit, such as 24.5GiB."),
        ("memory = true", "memory in run.toml is true: it must be text."),
        ('memory = "120%"', "memory in run.toml is '120%': a share must be at most 100%, such as 80%."),
        ("gpu = 4090", "gpu in run.toml is 4090: it must be text."),
        ('gpu = "v100-64gb"', "gpu in run.toml is 'v100-64gb': it is not a known GPU; nearest are v100-16gb and "
         "v100-32gb."),
        ('memory = "24GiB"\ngpu = "t4"', "memory in run.toml and gpu in run.toml exclude each other: give one of "
         "them."),
        ("gradient_checkpointing = 1", "gradient_checkpointing in run.toml is 1: it must be auto, none, selective, "
         "full or offload."),
        ('gradient_checkpointing = "true"', "gradient_checkpointing in run.toml is 'true': it must be auto, none, "
         "selective, full or offload."),
        ('layout = "dense"', "layout in run.toml is 'dense': it must be auto, padded or packed."),
        ("compile = true", "compile in run.toml is true: it must be auto, none, layers or graphs."),
        ("max_tokens_per_batch = 1", "run.toml has the unknown key 'max_tokens_per_batch': did you mean "
         "'token_budget'?"),
        ("max_memory = 1", "run.toml has the unknown key 'max_memory': did you mean 'memory'?"),
        ("data = 3", "data in run.toml is 3: it must be text or a list of texts."),
        ("data = ['a', false]", "data in run.toml contains false: it must be text."),
        ("data = []", "data in run.toml is a list: it must not be an empty list."),
        ("validation_data = 'a'\nvalidation_fraction = 0.1", "--validation-data and --validation-fraction exclude each "
         "other: give one of them."),
        ("out = 3", "out in run.toml is 3: it must be the name of a folder."),
        ("seed = 2024-01-01", "seed in run.toml is 2024-01-01: it must be a whole number."),
        ("steps = 1\nepochs = 2", "steps in run.toml and epochs in run.toml exclude each other: give one of them."),
        ("steps = 1\nlr = \n", "run.toml is not valid TOML: invalid value (at line 2, column 6)."),
        ("steps 1", "run.toml is not valid TOML: expected '=' after a key in a key/value pair (at line 1, "
         "column 7)."),
        ("lr = " + "[" * 9999, "run.toml is nested too deeply: settings are single values."),
        (b"data = '\xff'", "run.toml is not UTF-8 text: byte 8 cannot be read."),
    ],
)  # fmt: skip
def test_file_error_names_file_and_key(text: str | bytes, expected: str, folder: Path):
    write(folder, text)
    assert complaint("train", "--config", "run.toml") == expected


def test_missing_file_or_folder_is_rejected(folder: Path):
    (folder / "runs").mkdir()
    assert (
        complaint("train", "--config", "no.toml")
        == "no.toml does not exist: settings are read from a TOML or YAML file."
    )
    assert complaint("train", "--config", "runs") == "runs is a folder: settings are read from a TOML or YAML file."
    assert complaint("train", "--config", "") == "--config is '': it must not be empty."


def test_config_that_is_no_regular_file_is_rejected(folder: Path):
    expected = "{} is a {}: settings are read from a TOML or YAML file. Write the settings to a file."
    os.mkfifo(folder / "run.toml")
    assert complaint("plan", "--config", "run.toml") == expected.format("run.toml", "pipe")
    assert complaint("train", "--config", "/dev/zero") == expected.format("/dev/zero", "device")
    read_end, write_end = os.pipe()  # as of a shell's <(command)
    try:
        name = f"/dev/fd/{read_end}"
        assert complaint("verify", "--config", name) == expected.format(name, "pipe")
    finally:
        os.close(read_end)
        os.close(write_end)


def test_invalid_flag_over_valid_file_names_flag(folder: Path):
    write(folder, "lr = 1\n")
    assert complaint("train", "--config", "run.toml", "--lr", "x") == "--lr is 'x': it must be a number."


def test_long_value_is_truncated():
    said = complaint("train", "--steps", "9" * 6000)
    assert said == f"--steps is {'9' * 57}...: it is too large."


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["xyz"], "unknown command 'xyz': see bigbatch --help."),
        ([""], "unknown command '': see bigbatch --help."),
        (["--lr=3", "train"], "--lr must follow a command, as in bigbatch train --steps 3: see bigbatch --help."),
    ],
)
def test_unknown_command_is_rejected(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert capsys.readouterr() == ("", f"bigbatch: {expected}\n")


# help ------------------------------------------------------------------------------------------------------------


def test_overview_lists_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == overview
    assert all(f"\n  {command} " in overview for command in COMMANDS)
    assert (
        "0 success    1 failure    2 invalid input    130 interrupted\n  75 stopped by a signal after saving"
        in overview
    )


@pytest.mark.parametrize("columns", [40, 80])
def test_overview_fits_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(columns, len("usage: bigbatch COMMAND [--flag value ...]"))


def test_commands_are_the_same_everywhere():
    assert list(COMMANDS) == list(COMMAND_SPECS)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bigbatch {bigbatch.__version__}\n"


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("columns", ["50", "80", "300"])
def test_help_fits_terminal(command: str, columns: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    flags_and_text = [line for line in help_text(command).splitlines() if "bigbatch" not in line and "|" not in line]
    assert max(map(len, flags_and_text)) <= min(int(columns), 100)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_shows_every_flag_and_true_default(command: str):
    shown = " ".join(help_text(command).split())
    spec = COMMAND_SPECS[command]
    for key, info in spec.fields().items():
        name = POSITIONAL_NAMES[key] if key in spec.positionals else "--" + key.replace("_", "-")
        assert f"{name} " in shown
        if info.annotation is bool or info.is_required():
            continue
        described = shown[shown.index(" ".join((info.description or "").split())) :]
        assert "(default: " in described[: len(info.description or "") + 30]


def test_dependent_defaults_are_described_correctly():
    shown = " ".join(help_text("train").split())
    assert f"(default: {TrainConfig().resolved().global_batch}, unless --global-batch-tokens is given)" in shown
    assert f"(default: {DEFAULT_STEPS} for tiny on python-stdlib" in shown
    rates = [
        TrainConfig(model=model, lora_rank=rank).resolved().lr for model, rank in (("tiny", 0), ("m", 0), ("m", 1))
    ]
    rates.append(TrainConfig(model_config="config.json").resolved().lr)
    rates += [TrainConfig(model="m", objective="dpo", lora_rank=rank).resolved().lr for rank in (0, 1)]
    described = (
        "(default: {:g} for tiny, {:g} for other models, {:g} with LoRA, {:g} with --model-config; with --objective "
        "dpo {:g} and {:g}; a fifth of these for lion)"
    )
    assert described.format(*rates) in shown


@pytest.mark.parametrize("command", ["train", "plan", "verify"])
def test_help_explains_microbatch_settings(command: str):
    shown = " ".join(help_text(command).split())
    assert "--microbatch auto|N sequences in one forward and backward; affects memory and speed, not the " in shown
    assert "--token-budget N tokens, padding included, in one forward and backward, instead of --microbatch; " in shown
    assert "--memory MEMORY memory that the run may use with --microbatch auto, such as 24GiB or 80%; set it " in shown
    assert "--gpu GPU memory limit by the name of a GPU, such as a100-40gb, instead of --memory" in shown
    assert "--gradient-checkpointing auto|none|selective|full|offload activation checkpointing: layers " in shown
    assert "without a value: full" in shown
    assert "--layout auto|padded|packed padded = one row for each sequence; packed = one row without padding" in shown
    assert "--compile auto|none|layers|graphs layers = compile the layers of the model" in shown


def test_help_wins_over_errors(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--bogus", "--help"]) == 0
    assert capsys.readouterr().out == help_text("train")


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_examples_parse(command: str):
    for example in COMMAND_SPECS[command].examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("bigbatch", command)
        assert all(isinstance(model, BaseModel) for model in parse(command, words))


def test_foreign_flag_names_suggest_ours():
    ours = COMMAND_SPECS["verify"].fields()
    assert set(FOREIGN_NAMES.values()) <= set(ours)
    assert not set(FOREIGN_NAMES) & set(ours)


# the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_ends_quietly(unbuffered: str):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bigbatch", "train", "--help"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_ends_with_sentence_and_130(folder: Path):
    os.mkfifo(folder / "hold")  # reading it waits for a writer: a command that is busy for sure
    script = (
        "import signal, sys; from bigbatch.cli import arguments, main;"
        "arguments.parse = lambda *_: open('hold').read();"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # a shell's background job ignores it
        "sys.exit(main(['train']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        writer = None
        while writer is None and process.poll() is None:
            try:
                writer = os.open("hold", os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # not opened for reading yet
                continue
        assert writer is not None
        process.send_signal(signal.SIGINT)
        os.close(writer)  # if the signal came just before the read, this ends it, and the signal is handled then
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "\nbigbatch train: interrupted.\n")
