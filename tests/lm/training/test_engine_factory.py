"""The engine factory: the only constructor of engines, with the settings of training."""

import ast
from pathlib import Path

import pytest

import bigbatch.lm
from bigbatch import TokenBudget
from bigbatch.lm.config.train_config import TrainConfig
from bigbatch.lm.training.engine_factory import make_engine, make_training_engine
from bigbatch.lm.training.optimizer import make_optimizer
from bigbatch.lm.training.setup import TrainingSetup, set_up_training
from support.language_models import records, write_jsonl

LM = Path(bigbatch.lm.__file__).parent


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    data = tmp_path_factory.mktemp("factory") / "data.jsonl"
    write_jsonl(data, records(20))
    config = TrainConfig(data=str(data), device="cpu", max_length=32, token_budget=70, max_grad_norm=0.5)
    return set_up_training(config)


@pytest.mark.parametrize(("name", "home"), [("Engine", "engine_factory"), ("PeakPredictor", "engine_factory")])
def test_only_the_factory_constructs(name: str, home: str) -> None:
    def constructs(path: Path) -> bool:
        calls = (node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
        return any(
            name in (getattr(call, "id", None), getattr(getattr(call, "value", None), "id", None)) for call in calls
        )

    assert [path.stem for path in sorted(LM.rglob("*.py")) if constructs(path)] == [home]


def test_training_engine_has_the_limits_of_its_config(setup: TrainingSetup) -> None:
    engine = make_training_engine(setup, make_optimizer(setup.model, setup.config, setup.device_spec))
    assert engine.microbatch == TokenBudget(70)
    assert (engine.memory, engine.layout, engine.collate) == (None, "padded", setup.collate)
    assert engine.step([setup.training[i] for i in range(4)]).tokens == sum(setup.training.lengths[:4])


def test_engine_chooses_its_micro_batch_by_default(setup: TrainingSetup) -> None:
    engine = make_engine(setup.model_setup, make_optimizer(setup.model, setup.config, setup.device_spec))
    assert (engine.microbatch, engine.choice) == ("auto", None)
