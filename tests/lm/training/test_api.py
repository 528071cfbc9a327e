"""`bigbatch.lm.train`: datasets, losses and callbacks of the caller, and runs that are resumed with them."""

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor
from transformers.utils import logging

import bigbatch
from bigbatch import lm
from bigbatch.cli import main
from bigbatch.errors import InputError, RankFailedError
from bigbatch.lm.data.documents import Document
from bigbatch.lm.data.tokenization import encode_documents
from bigbatch.lm.data.tokenizer import load_tokenizer
from bigbatch.lm.report.page import page
from bigbatch.lm.report.run_reader import read_run
from bigbatch.lm.training.library_output import silent_libraries
from bigbatch.lm.training.user_callbacks import METHODS
from support import gloo_processes
from support.language_models import conversations, metrics, records, save_model_folder, write_jsonl
from support.run_comparison import CLOCK, differences


class Samples:
    """A map-style dataset of tokenized samples of different lengths, each with a weight for the loss."""

    def __init__(self, number: int = 30) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = [(3 + 7 * index + 5 * place) % 290 for place in range(4 + (5 * index) % 13)]
        return {"input_ids": tokens, "gain": 1.0 + index % 3}


def weighted_loss(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(microbatch["input_ids"], attention_mask=microbatch["attention_mask"]).logits
    labels, gain = microbatch["labels"], microbatch["gain"][:, None]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return (losses * gain).sum(), ((labels != -100) * gain).sum()


def plain_loss(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, int]:
    logits = model(microbatch["input_ids"], attention_mask=microbatch["attention_mask"]).logits
    labels = microbatch["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum"), int((labels >= 0).sum())


class Recorder(lm.Callback):
    """Keeps every event in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_start(self, run: lm.RunStart) -> None:
        self.events.append(("start", run))

    def on_update(self, row: dict[str, Any]) -> None:
        self.events.append(("update", row["step"]))
        row.clear()  # a copy: the line in metrics.jsonl is complete

    def on_validation(self, step: int, loss: float) -> None:
        self.events.append(("validation", step, loss))

    def on_sample(self, step: int, text: str) -> None:
        self.events.append(("sample", step))

    def on_end(self, result: lm.RunResult) -> None:
        self.events.append(("end", result))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    base = save_model_folder(tmp_path / "base")
    return {
        "model": str(base), "device": "cpu", "global_batch": 8, "microbatch": 3, "epochs": 1, "lr": 1e-2,
        "max_length": 32, "checkpoint_every": 2, "validation_every": 2,
    }  # fmt: skip


def comparable(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in metrics(run)]


# datasets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_records_train_as_a_file_of_them_does(settings: dict[str, Any], tmp_path: Path, kind: str) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", records(40))
    by_file = lm.train({**settings, "data": str(file), "out": tmp_path / "file"})
    rows: Any = records(40) if kind == "list" else datasets.Dataset.from_list(records(40))
    passed = lm.train({**settings, "out": tmp_path / "passed"}, rows)
    assert comparable(passed.path) == comparable(by_file.path)
    assert passed.notes[0] == "40 records of dataset"
    assert passed.validation_loss == by_file.validation_loss is not None


def test_result_names_model_and_metrics(settings: dict[str, Any], tmp_path: Path) -> None:
    result = lm.train({**settings, "out": tmp_path / "run"}, conversations(20))
    assert (result.path, result.model_path) == (tmp_path / "run", tmp_path / "run" / "model")
    assert (result.step, result.skipped, result.finished) == (len(metrics(result.path)), 0, True)
    assert list(result.metrics) == metrics(tmp_path / "run")
    assert (result.model_path / "model.safetensors").is_file()
    adapted = lm.train({**settings, "out": tmp_path / "adapted", "lora_rank": 2}, conversations(20))
    assert (adapted.model_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("has_bars", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_libraries_are_silent_and_their_settings_restored(
    settings: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    library_settings: None,
    has_bars: bool,
    fails: bool,
) -> None:
    logging.set_verbosity(logging.INFO)
    (logging.enable_progress_bar if has_bars else logging.disable_progress_bar)()
    disable_progress_bars("group")
    settings |= {"gradient_checkpointing": "full", "out": tmp_path / "run"}
    with pytest.raises(RuntimeError, match="no update") if fails else nullcontext():
        lm.train(settings, conversations(20), callbacks=[Failing()] if fails else ())
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, has_bars)
    assert (are_progress_bars_disabled(), are_progress_bars_disabled("group")) == (not has_bars, True)
    assert capfd.readouterr() == ("", "")


class Failing(lm.Callback):
    """Fails before the first update."""

    def on_start(self, run: lm.RunStart) -> None:
        raise RuntimeError("no update")


@pytest.fixture
def library_settings() -> Iterator[None]:
    """Restore what a test sets in transformers and huggingface_hub."""
    with silent_libraries():
        yield


def test_tokenized_samples_equal_the_text_they_are_made_of(settings: dict[str, Any], tmp_path: Path) -> None:
    texts = [row["completion"] for row in records(30)]
    tokenizer = load_tokenizer(settings["model"])
    encoded = list(encode_documents([Document("", text=text) for text in texts], tokenizer))
    settings["validation_fraction"] = 0
    as_text = lm.train({**settings, "out": tmp_path / "text"}, [{"text": text} for text in texts])
    for name, rows in {
        "lists": [{"input_ids": found.tokens, "attention_mask": [1] * len(found.tokens)} for found in encoded],
        "tensors": [{"input_ids": (t := torch.tensor(found.tokens)), "labels": t} for found in encoded],
    }.items():
        as_tokens = lm.train({**settings, "out": tmp_path / name}, rows)
        assert not differences(as_tokens.path, as_text.path)[1:], name  # the state differs in its fingerprints alone
        assert comparable(as_tokens.path) == comparable(as_text.path)


def test_masked_labels_and_weights_count_in_the_divisor(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "weights": [0, 0, 1, 0.5, 0]},
        {"input_ids": [9, 8, 7]},
    ]
    result = lm.train({**settings, "validation_fraction": 0, "out": tmp_path / "run"}, rows)
    assert [row["items"] for row in result.metrics] == [3.5]


def test_part_of_samples_is_held_out_or_passed(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["validation_fraction"] = 0.3
    part = lm.train(
        {**settings, "out": tmp_path / "part"}, [{"input_ids": Samples()[i]["input_ids"]} for i in range(30)]
    )
    assert part.notes[:2] != ()
    assert [note.rpartition("; ")[2] for note in part.notes[:2]] == ["22 sequences", "8 sequences"]
    rows = [{"input_ids": [3, 4, 5]}, {"input_ids": [5, 6, 7]}]
    both = lm.train({**settings, "out": tmp_path / "both"}, rows, validation_dataset=rows[:1])
    assert [note.rpartition("; ")[2] for note in both.notes[:2]] == ["2 sequences", "1 sequence"]
    texts = lm.train({**settings, "out": tmp_path / "texts"}, records(10), validation_dataset=records(3))
    assert "3 records of validation_dataset" in texts.notes
    assert texts.validation_loss is not None


IDS = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "dataset is empty. Pass at least one sample."),
        ({"train": [IDS]}, "dataset has 'train': pass one of its entries, such as dataset['train']."),
        (iter([IDS]), "dataset is list_iterator, and must have a length and an index, because samples are read in a "
         "random order: pass a list, a map-style dataset or a datasets.Dataset."),
        (["text"], "dataset[0] is str, and must be a dict with 'input_ids', or a record such as {'text': ...} or "
         "{'messages': [...]}."),
        ([IDS, {"text": "a"}], "dataset[1] has no 'input_ids', and dataset[0] has."),
        ([{"input_ids": [1]}], "dataset[0] has 1 token: at least 2 are needed to predict one from another."),
        ([{"input_ids": [1] * 34}], "dataset[0] has 34 tokens, and max_length is 32: a sample has at most one token "
         "more. Shorten it, or raise max_length."),
        ([{"input_ids": [1, 2, 999]}], "dataset[0] has the token 999, and the tokenizer of the model has 0 to 299."),
        ([{"input_ids": [[1, 2]]}], "dataset[0]: 'input_ids' has 2 dimensions: pass one sample, without a batch "
         "dimension."),
        ([{"input_ids": [1.5, 2]}], "dataset[0]: 'input_ids' must be a list of whole numbers."),
        ([{"input_ids": "12"}], "dataset[0]: 'input_ids' is no number and no list of numbers (new(): invalid data "
         "type 'str')."),
        ([IDS | {"labels": [1, 2]}], "dataset[0] has 3 tokens and 'labels' of 2: pass one for each token; bigbatch "
         "shifts them."),
        ([IDS | {"labels": [1, 2, -1]}], "dataset[0]: 'labels' must be -100, for what is not trained on, or tokens of "
         "the model."),
        ([IDS | {"labels": [1, -100, -100]}], "dataset[0] has no label to train on. Leave it out."),
        ([IDS | {"weights": [1, -1, 1]}], "dataset[0]: 'weights' must be finite and not negative."),
        ([IDS | {"weights": [1, float("nan"), 1]}], "dataset[0]: 'weights' must be finite and not negative."),
        ([IDS | {"attention_mask": [1, 1, 0]}], "dataset[0] has padding in 'attention_mask': pass samples without "
         "padding; bigbatch adds it."),
        ([IDS, IDS | {"reward": 1.0}], "dataset[1] has 'reward', which the loss does not use. Remove it, or pass a "
         "loss_fn that does."),
    ],
)  # fmt: skip
def test_unusable_dataset_is_one_sentence(settings: dict[str, Any], tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        lm.train({**settings, "out": tmp_path / "run"}, rows)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_record_of_unknown_shape_names_its_index(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^dataset\[1\]: "):
        lm.train({**settings, "out": tmp_path / "run"}, [{"text": "a b"}, {"words": "a"}])


def test_sample_that_changes_during_the_run_is_an_error(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5 + i]} for i in range(10)]

    class Change(lm.Callback):
        def on_update(self, row: dict[str, Any]) -> None:
            for sample in rows:
                sample["input_ids"] = [4, 4, 4]

    with pytest.raises(InputError, match=r"^dataset\[\d\] has changed since the run started: it must be the same"):
        lm.train(
            {**settings, "epochs": None, "steps": 3, "global_batch": 2, "out": tmp_path / "run"},
            rows,
            callbacks=[Change()],
        )


# settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"leraning_rate": 1}, {}, "'leraning_rate' is not a setting: did you mean 'lr'?"),
        ({"global_batch": 0}, {}, "global_batch is 0: it must be at least 1."),
        (7, {}, "the configuration is int: pass a TrainConfig, a dict of settings, or the path of a TOML or YAML "
         "file."),
        ("no.toml", {}, "no.toml does not exist: settings are read from a TOML or YAML file."),
        ({"data": "a"}, {"dataset": [IDS]}, "dataset and the setting data exclude each other: pass one of "
         "them."),
        ({}, {"validation_dataset": [IDS]}, "validation_dataset needs a dataset; for files, use the setting "
         "validation_data."),
        ({}, {"loss_fn": 3}, "loss_fn is int: pass a function of a model and a micro-batch."),
        ({"layout": "packed"}, {"loss_fn": plain_loss}, "layout packed is not supported with a loss_fn. Leave the "
         "setting out."),
        ({}, {"dataset": [IDS], "validation_dataset": [{"text": "a"}]}, "dataset has 'input_ids' and "
         "validation_dataset has not: pass samples or records in both."),
        ({"model": "tiny"}, {"dataset": [IDS]}, "dataset has 'input_ids', and the tokenizer of this model is trained "
         "on text: pass records with text, or the model whose tokenizer made the tokens."),
        ({}, {"callbacks": [Recorder]}, "the callback Recorder is a class: pass an object of it, Recorder(...)."),
        ({}, {"callbacks": [3]}, f"the callback int has none of the methods {', '.join(METHODS)}."),
    ],
)  # fmt: skip
def test_unusable_argument_is_one_sentence(tmp_path: Path, config: Any, arguments: Any, message: str) -> None:
    if isinstance(config, dict):
        config["out"] = str(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        lm.train(config, **arguments)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_misspelled_method_of_callback_is_refused() -> None:
    class Wrong(lm.Callback):
        def on_step_end(self, row: dict[str, Any]) -> None: ...

    with pytest.raises(InputError) as caught:
        lm.train(callbacks=[Wrong()])
    assert str(caught.value) == (
        f"the callback Wrong has 'on_step_end', which is never called. The methods are {', '.join(METHODS)}."
    )


def test_file_of_settings_is_read(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{name}: {value}" for name, value in {**settings, "steps": 2, "out": "run"}.items() if name != "epochs"]
    Path("run.yaml").write_text("\n".join(lines), encoding="utf-8")
    assert lm.train("run.yaml", records(20)).step == 2
    Path("run.yaml").write_text("steps: none", encoding="utf-8")
    with pytest.raises(InputError, match=r"^steps in run.yaml is 'none': it must be a whole number\.$"):
        lm.train("run.yaml")


# losses ------------------------------------------------------------------------------------------------------------


def test_own_cross_entropy_gives_the_run_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["precision"] = "float64"
    one = lm.train({**settings, "out": tmp_path / "one"}, records(40))
    two = lm.train({**settings, "out": tmp_path / "two"}, records(40), loss_fn=plain_loss)
    assert [row["items"] for row in one.metrics] == [row["items"] for row in two.metrics]
    assert [row["loss"] for row in two.metrics] == pytest.approx([row["loss"] for row in one.metrics], rel=1e-12)
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-12)


def test_own_loss_is_exact_for_every_micro_batch(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["precision"] = "float64"
    whole, cut = (
        lm.train({**settings, "microbatch": size, "out": tmp_path / f"{size}"}, Samples(), loss_fn=weighted_loss)
        for size in (8, 1)
    )
    assert [row["loss"] for row in cut.metrics] == pytest.approx([row["loss"] for row in whole.metrics], rel=1e-12)
    assert [row["items"] for row in cut.metrics] == [row["items"] for row in whole.metrics]


def test_own_loss_has_neither_unit_nor_perplexity(settings: dict[str, Any], tmp_path: Path) -> None:
    lm.train({**settings, "out": tmp_path / "own"}, records(40), loss_fn=plain_loss)
    lm.train({**settings, "out": tmp_path / "stock"}, records(40))
    own, stock = read_run(tmp_path / "own"), read_run(tmp_path / "stock")
    assert own.columns.has("validation_loss")
    assert not own.columns.has("validation_perplexity")
    assert stock.columns.has("validation_perplexity")
    assert (own.loss_unit, stock.loss_unit) == ("", "nats per token")
    assert "perplexity" not in page([own])
    assert "nats per token" not in page([own])


def test_mean_as_loss_is_warned_about(settings: dict[str, Any], tmp_path: Path) -> None:
    def mean_loss(model: Any, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss_sum, count = plain_loss(model, microbatch)
        return loss_sum / count, torch.tensor(count)

    with pytest.warns(UserWarning, match="mean"):
        lm.train({**settings, "out": tmp_path / "run"}, records(20), loss_fn=mean_loss)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(()), "loss_fn returned Tensor: return (loss_sum, count), the sum of the losses and what it is "
         "divided by."),
        ((torch.ones(2), 2), "loss_fn returned tensors of the shapes [2] and []: return a sum and a count without "
         "dimensions, such as losses.sum() and mask.sum()."),
    ],
)  # fmt: skip
def test_wrong_result_of_loss_is_one_sentence(
    settings: dict[str, Any], tmp_path: Path, found: Any, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        lm.train({**settings, "out": tmp_path / "run"}, records(20), loss_fn=lambda model, microbatch: found)
    assert str(caught.value) == message


# callbacks ---------------------------------------------------------------------------------------------------------


def test_events_arrive_in_order(settings: dict[str, Any], tmp_path: Path) -> None:
    recorder = Recorder()
    result = lm.train({**settings, "out": tmp_path / "run"}, records(40), callbacks=[recorder])
    kinds = [event[:2] for event in recorder.events[1:-1]]
    assert [kind for kind in kinds if kind[0] == "update"] == [("update", step) for step in range(1, 6)]
    assert kinds[:4] == [("update", 1), ("update", 2), ("validation", 2), ("sample", 2)]
    (first, start), (last, end) = recorder.events[0], recorder.events[-1]
    assert (first, last) == ("start", "end")
    assert (start.path, start.step, start.total_steps) == (tmp_path / "run", 0, 5)
    assert type(start.model).__name__ == "LlamaForCausalLM"
    assert end == result
    assert all(row["loss"] for row in result.metrics)


class StopAt(lm.Callback):
    def __init__(self, step: int, error: Exception) -> None:
        self.step, self.error = step, error

    def on_update(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            raise self.error


def test_stopped_run_resumes_to_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = lm.train({**settings, "out": tmp_path / "whole"}, Samples(), loss_fn=weighted_loss)
    stopped = lm.train(
        {**settings, "out": tmp_path / "run"},
        Samples(),
        loss_fn=weighted_loss,
        callbacks=[StopAt(3, lm.StopTraining("enough"))],
    )
    assert (stopped.step, stopped.finished) == (3, False)
    assert "StopAt.on_update: enough" in (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8")
    recorder = Recorder()
    resumed = lm.train(resume=tmp_path / "run", dataset=Samples(), loss_fn=weighted_loss, callbacks=[recorder])
    assert recorder.events[0][1].step == 3
    assert (resumed.step, resumed.finished) == (whole.step, True)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_exception_of_callback_is_raised_after_saving(settings: dict[str, Any], tmp_path: Path) -> None:
    recorder = Recorder()
    whole = lm.train({**settings, "out": tmp_path / "whole"}, records(40))
    with pytest.raises(ZeroDivisionError, match="fault") as caught:
        lm.train(
            {**settings, "out": tmp_path / "run"},
            records(40),
            callbacks=[StopAt(3, ZeroDivisionError("fault")), StopAt(3, KeyError("other")), recorder],
        )
    assert caught.value.__notes__ == [
        "raised by StopAt.on_update; the run was saved, and can be resumed",
        "StopAt.on_update raised KeyError, too: 'other'",
    ]
    assert recorder.events[-1] == ("update", 3)
    again = Recorder()
    assert lm.train(resume=str(tmp_path / "run"), dataset=records(40), callbacks=[again]).step == whole.step
    assert again.events[0][1].step == 3
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_exception_before_the_first_update_ends_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    class Failing:
        def on_start(self, run: lm.RunStart) -> None:
            raise OSError("no such host")

    with pytest.raises(OSError, match="no such host"):
        lm.train({**settings, "out": tmp_path / "run"}, records(40), callbacks=[Failing()])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# resuming ----------------------------------------------------------------------------------------------------------


class KillAt(lm.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_update(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(settings: dict[str, Any], step: int) -> None:
    """Train in a forked process that is killed after an update."""
    child = os.fork()
    if child == 0:
        try:
            lm.train(settings, Samples(), loss_fn=weighted_loss, callbacks=[KillAt(step)])
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("step", [1, 4])
def test_killed_run_resumes_bit_for_bit(settings: dict[str, Any], tmp_path: Path, step: int) -> None:
    lm.train({**settings, "out": tmp_path / "whole"}, Samples(), loss_fn=weighted_loss)
    train_until_killed({**settings, "out": tmp_path / "run"}, step)
    assert len(metrics(tmp_path / "run")) == step - 1
    recorder = Recorder()
    lm.train(resume=tmp_path / "run", dataset=Samples(), loss_fn=weighted_loss, callbacks=[recorder])
    assert recorder.events[0][1].step == (step - 1) // 2 * 2
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_command_refuses_to_resume_run_with_own_dataset(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_until_killed({**settings, "out": run}, 1)  # before the first checkpoint
    capfd.readouterr()
    assert main(["resume", str(run)]) == 2
    expected = (
        f"{run} was started in Python with its own dataset and loss_fn: resume it with "
        f"bigbatch.lm.train(resume={str(run)!r}, ...), passing the same.\n"
    )
    assert capfd.readouterr().err == f"bigbatch resume: {expected}"
    lm.train(resume=run, dataset=Samples(), loss_fn=weighted_loss)
    assert main(["advise", str(run), "--branch"]) == 2
    assert capfd.readouterr().err.endswith(f"bigbatch advise: {expected}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": weighted_loss}, "{} was started with its own dataset: pass the same dataset to resume it."),
        ({"dataset": Samples()}, "{} was started with its own loss_fn: pass the same loss_fn to resume it."),
        ({"dataset": Samples(), "loss_fn": plain_loss}, "{} was started with the loss_fn weighted_loss and cannot be "
         "resumed with plain_loss. Pass the same."),
        ({"dataset": Samples(), "loss_fn": weighted_loss, "validation_dataset": Samples(2)}, "{} was started without a "
         "validation_dataset and cannot be resumed with one. Leave it out."),
        ({"dataset": Samples(29), "loss_fn": weighted_loss}, "dataset differs from the one that {} was started with: "
         "it has 28 sequences to train on and had 29, or their content differs. Pass the same."),
        ({"config": {"lr": 0.5}, "dataset": Samples(), "loss_fn": weighted_loss}, "{} was started with --lr 0.01 and "
         "cannot be resumed with --lr 0.5. Leave the flag out, or start a new run."),
    ],
)  # fmt: skip
def test_resuming_with_something_else_is_refused(
    settings: dict[str, Any], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    stop = [StopAt(1, lm.StopTraining())]
    lm.train({**settings, "out": run}, Samples(), loss_fn=weighted_loss, callbacks=stop)
    with pytest.raises(InputError) as caught:
        lm.train(resume=run, **arguments)
    assert str(caught.value) == message.format(run)


def test_finished_run_is_returned_without_training(settings: dict[str, Any], tmp_path: Path) -> None:
    recorder = Recorder()
    config = {**settings, "out": tmp_path / "run"}
    before = lm.train(config, records(20))
    again = lm.train(config, records(20), resume=tmp_path / "run", callbacks=[recorder])
    assert (again.step, again.finished, again.elapsed_s) == (before.step, True, 0.0)
    assert again.metrics == before.metrics
    assert recorder.events == []


def test_run_of_command_continues_in_python_and_back(settings: dict[str, Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", records(40))
    settings["data"] = str(file)
    lm.train({**settings, "out": tmp_path / "whole"})
    stopped = lm.train({**settings, "out": tmp_path / "run"}, callbacks=[StopAt(3, lm.StopTraining())])
    assert not stopped.finished
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []


# ranks -------------------------------------------------------------------------------------------------------------


def on_rank(settings: dict[str, Any], error: Exception | None) -> Any:
    recorder = Recorder()
    try:
        result = lm.train(
            settings,
            Samples(),
            loss_fn=weighted_loss,
            callbacks=[recorder] if error is None else [StopAt(2, error), recorder],
        )
    except Exception as caught:  # noqa: BLE001  compared by the test
        return type(caught).__name__, str(caught)
    return result.step, result.finished, [event[0] for event in recorder.events]


def test_ranks_train_the_run_of_one_process(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["precision"] = "float64"
    alone = lm.train({**settings, "out": tmp_path / "alone"}, Samples(), loss_fn=weighted_loss)
    first, second = gloo_processes.run(on_rank, 2, {**settings, "out": tmp_path / "two"}, None)
    assert (first[:2], second) == ((alone.step, True), (alone.step, True, []))
    assert first[2][0] == "start"
    losses = [row["loss"] for row in metrics(tmp_path / "two")]
    assert losses == pytest.approx([row["loss"] for row in alone.metrics], rel=1e-12)


def test_failed_callback_ends_all_ranks_and_the_run_resumes(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["steps"] = settings.pop("epochs") * 6
    run = {**settings, "out": tmp_path / "run"}
    first, second = gloo_processes.run(on_rank, 2, run, ZeroDivisionError("fault"))
    assert first == ("ZeroDivisionError", "fault")
    assert second == (
        RankFailedError.__name__,
        "a callback failed on the first rank (StopAt.on_update: ZeroDivisionError); the run was saved.",
    )
    assert len(metrics(tmp_path / "run")) == 3  # the ranks agree during the next update
    assert lm.train(resume=tmp_path / "run", dataset=Samples(), loss_fn=weighted_loss).step == 6


def test_public_names_are_listed() -> None:
    assert set(dir(lm)) == set(lm.__all__)
    assert issubclass(InputError, bigbatch.BigbatchError)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = lm.trian  # type: ignore[attr-defined]


def test_run_that_ended_early_is_not_continued(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"epochs": 9, "validation_every": 1, "early_stopping": 1, "early_stopping_min_delta": 9.0}
    ended = lm.train({**settings, "out": tmp_path / "run"}, records(40))
    assert (ended.step, ended.finished, ended.stopped_early) == (2, True, True)
    again = lm.train(resume=tmp_path / "run", dataset=records(40))
    assert (again.step, again.finished, again.stopped_early, again.elapsed_s) == (2, True, True, 0.0)
    assert again.metrics == ended.metrics


def test_alias_of_setting_is_its_name() -> None:
    with pytest.raises(InputError, match=r"^'model_confg' is not a setting: did you mean 'model_config'\?$"):
        lm.train({"model_confg": "x"})


def test_result_of_a_finished_run_has_the_saved_step(settings: dict[str, Any], tmp_path: Path) -> None:
    asked = {**settings, "out": tmp_path / "run", "keep": "best", "validation_every": 1}
    first = lm.train(asked, records(40))
    again = lm.train(resume=tmp_path / "run", dataset=records(40))
    assert (again.saved_step, again.best_step) == (first.saved_step, first.best_step)
