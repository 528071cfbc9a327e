"""Every update of the trainers of TRL has the gradient of its whole batch, and their metrics are means over windows."""

from pathlib import Path

import pytest
import torch
from trl import DPOTrainer

import bigbatch
from bigbatch.integrations.transformers import ExactTrainer, exact
from integrations.transformers import trl_cases as trl
from support.tiers import slow, slow_except

EXACT_IN_FLOAT32_NORMS = 1e-6
CASES = [
    ("sft", {}),
    ("sft", {"loss_type": "dft"}),
    ("dpo", {}),
    ("dpo", {"loss_type": ["ipo"]}),
    ("dpo", {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [1.0, 0.5]}),
    ("reward", {}),
    ("reward", {"center_rewards_coefficient": 0.1}),
    ("kto", {"loss_type": "apo_zero_unpaired"}),
]


@pytest.mark.parametrize(("kind", "settings"), slow_except(CASES, CASES[0], CASES[2], CASES[5], CASES[7]))
def test_each_window_has_whole_batch_gradient(tmp_path: Path, kind: str, settings):
    trainer, recorder = trl.make(tmp_path, kind, **settings)
    exact(trainer, microbatch=None if settings else 5).train()
    errors = trl.errors(tmp_path, kind, recorder, **settings)
    assert len(errors) == 3
    assert max(errors) <= EXACT_IN_FLOAT32_NORMS


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_last_window_of_stock_trainer_is_wrong(tmp_path: Path, kind: str):
    trainer, recorder = trl.make(tmp_path, kind)
    trainer.train()
    errors = trl.errors(tmp_path, kind, recorder)
    assert max(errors[:-1]) <= EXACT_IN_FLOAT32_NORMS
    assert errors[-1] > 0.1


class Mine(ExactTrainer, DPOTrainer):
    """The class form."""


def test_mixin_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(trl.KINDS, "mine", (Mine, trl.KINDS["dpo"][1]))
    trainer, recorder = trl.make(tmp_path, "mine")
    trainer.train()
    assert max(trl.errors(tmp_path, "dpo", recorder)) <= EXACT_IN_FLOAT32_NORMS
    assert trainer.bigbatch_report.items == 7


@pytest.mark.parametrize(("kind", "settings"), [slow(*CASES[2]), CASES[5], slow(*CASES[7])])
def test_metrics_do_not_depend_on_micro_batches(tmp_path: Path, kind: str, settings):
    logs = []
    for microbatch in (12, 5):
        trainer, _ = trl.make(tmp_path, kind, **settings)
        exact(trainer, microbatch=microbatch).train()
        logs.append(trainer.state.log_history[:-1])
    weighted = {"loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "mean_reward", "num_tokens"}
    weighted |= {"min_reward", "max_reward"}
    if kind == "kto":  # means over its chosen or rejected samples, whose shares differ
        weighted -= {"rewards/margins"}
    for whole, cut in zip(*logs, strict=True):
        assert whole.keys() == cut.keys()
        for name in weighted & whole.keys():
            assert cut[name] == pytest.approx(whole[name], rel=2e-5, abs=1e-7), name


def test_entropy_of_sft_is_weighted_by_tokens(tmp_path: Path):
    logs = []
    for microbatch in (12, 5):
        trainer, _ = trl.make(tmp_path, "sft")
        exact(trainer, microbatch=microbatch).train()
        logs.append([(entry["entropy"], entry["mean_token_accuracy"]) for entry in trainer.state.log_history[:-1]])
    assert logs[1] == [pytest.approx(values, rel=1e-5) for values in logs[0]]


@pytest.mark.slow
def test_trials_leave_no_metrics(tmp_path: Path):
    totals = []
    for settings in ({}, {"memory": "4GiB"}):
        trainer, _ = trl.make(tmp_path, "dpo")
        exact(trainer, **settings).train()
        totals.append([entry["num_tokens"] for entry in trainer.state.log_history[:-1]])
        assert all(not values for name, values in trainer._metrics["train"].items() if name != "num_tokens")
    assert totals[0] == totals[1]


def test_memory_retries_count_metrics_once(tmp_path: Path):
    logs = []
    for fails in (0, 3):
        trainer, _ = trl.make(tmp_path, "dpo")
        left = [fails]

        def run_out(*_, left=left) -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        trainer.model.lm_head.register_full_backward_pre_hook(run_out)  # the metrics were appended
        exact(trainer, items=lambda inputs: len(inputs["input_ids"]) // 2).train()
        logs.append([(e["num_tokens"], e["rewards/accuracies"]) for e in trainer.state.log_history[:-1]])
    assert logs[1] == [pytest.approx(values) for values in logs[0]]


@pytest.mark.parametrize("items", ["auto", lambda inputs: int((inputs["labels"][..., 1:] != -100).sum())])
def test_packed_rows_are_exact(tmp_path: Path, items):
    trainer, recorder = trl.make(tmp_path, "sft", padding_free=True, max_length=None)
    exact(
        trainer,
        items=items,
        microbatch=bigbatch.TokenBudget(24),
        lengths=lambda rows: [len(row["input_ids"]) for row in rows],
        layout="packed",
    ).train()
    assert max(trl.errors(tmp_path, "sft", recorder)) <= EXACT_IN_FLOAT32_NORMS
