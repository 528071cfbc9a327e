"""What `encode` and `loss` may return and do, and the sentences for what they may not."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigbatch
from coupled.models import CASES, TOLERANCE, Towers, batch, gradient_error, relative_error, towers, two_towers

Data = dict[str, Tensor]


def backward(encode: Any, loss: Any, model: nn.Module | None = None, cut: int = 4, **options: Any) -> Towers:
    model = towers() if model is None else model
    bigbatch.Engine(model, None, bigbatch.Coupled(encode, loss), microbatch=cut, check=False, **options).backward(
        batch()
    )
    return model


def plain(encode: Any, loss: Any) -> Towers:
    model = towers()
    loss(model, encode(model, batch())).backward()
    return model


def gram(_model: Any, features: Tensor) -> Tensor:
    return (features @ features.T).tanh().square().mean()


@dataclass
class Pair:
    left: Tensor
    right: Tensor
    name: str = "pair"


@pytest.mark.parametrize("cut", [4, 22])
@pytest.mark.parametrize("kind", [tuple, list, dict, Pair])
def test_containers_keep_their_type(kind: Any, cut: int) -> None:
    def encode(model: Any, part: Data) -> Any:
        left, right = two_towers(model, part)
        return {tuple: (left, right), list: [left, right], dict: {"l": left, "r": right}, Pair: Pair(left, right)}[kind]

    def loss(_model: Any, features: Any) -> Tensor:
        assert type(features) is kind
        left, right = _pair(features)
        return gram(None, left) + gram(None, left + right)

    assert gradient_error(backward(encode, loss, cut=cut), plain(encode, loss)) <= TOLERANCE


def _pair(features: Any) -> Any:
    if isinstance(features, Pair):
        return features.left, features.right
    return features.values() if isinstance(features, dict) else features


@pytest.mark.parametrize("cut", [4, 22])
def test_loss_may_change_features_in_place(cut: int) -> None:
    def encode(model: Any, part: Data) -> Any:
        left, right = two_towers(model, part)
        return left.tanh(), right.tanh()  # their backward reads their output

    def loss(_model: Any, features: Any) -> Tensor:
        left, right = features
        left.mul_(2.0).sub_(left.detach().mean())
        right[:, 0] = 1.0
        return gram(None, left) + gram(None, right)

    def loss_on_copies(model: Any, features: Any) -> Tensor:
        return loss(model, tuple(feature.clone() for feature in features))

    assert gradient_error(backward(encode, loss, cut=cut), plain(encode, loss_on_copies)) <= TOLERANCE


def test_frozen_encoder_is_constant() -> None:
    def encode(model: Any, part: Data) -> Any:
        with torch.no_grad():
            right = model.right(part["right"])
        return model.left(part["left"]), right

    case = CASES["clip"]
    model = backward(encode, case.loss)
    assert gradient_error(model, plain(encode, case.loss)) <= TOLERANCE
    assert all(p.grad is None for p in model.right.parameters())


def test_detached_features_train_head_alone() -> None:
    def encode(model: Any, part: Data) -> Tensor:
        return model.left(part["left"]).detach()

    def loss(model: Any, features: Tensor) -> Tensor:
        return gram(model, model.head(features))

    model = backward(encode, loss)
    assert gradient_error(model, plain(encode, loss)) <= TOLERANCE
    assert all(p.grad is None for p in model.left.parameters())


def test_unused_feature_gets_no_gradient() -> None:
    def loss(model: Any, features: Any) -> Tensor:
        return gram(model, features[0])

    model = backward(two_towers, loss)
    assert gradient_error(model, plain(two_towers, loss)) <= TOLERANCE
    assert all(p.grad is None for p in model.right.parameters())


def test_parameter_used_in_encode_and_loss_gets_both() -> None:
    def encode(model: Any, part: Data) -> Tensor:
        return model.left(part["left"]) * model.log_scale

    def loss(model: Any, features: Tensor) -> Tensor:
        return gram(model, model.left[3](features.repeat(1, 2)) * model.log_scale.exp())

    assert gradient_error(backward(encode, loss), plain(encode, loss)) <= TOLERANCE


def test_views_of_several_rows_a_sample_are_reshaped() -> None:
    def encode(model: Any, part: Data) -> Tensor:
        return torch.stack([model.shared(part["left"]), model.shared(part["other"])], dim=1)

    def loss(_model: Any, features: Tensor) -> Tensor:
        return bigbatch.losses.sup_con(features, torch.arange(len(features)))

    assert gradient_error(backward(encode, loss), plain(encode, loss)) <= TOLERANCE


def test_reentrant_checkpoint_in_encode_is_exact() -> None:
    from torch.utils.checkpoint import checkpoint

    def encode(model: Any, part: Data) -> Any:
        left = checkpoint(model.left, part["left"].requires_grad_(), use_reentrant=True)
        return left, model.right(part["right"])

    loss = CASES["clip"].loss
    assert gradient_error(backward(encode, loss), plain(two_towers, loss)) <= TOLERANCE


def test_features_of_two_dtypes_and_scalars_travel() -> None:
    def encode(model: Any, part: Data) -> Any:
        return {
            "wide": model.left(part["left"]),
            "narrow": model.right(part["right"]).float(),
            "width": 4,
            "none": None,
        }

    def loss(_model: Any, features: Any) -> Tensor:
        assert features["none"] is None
        return gram(None, features["wide"] + features["narrow"].double()) / features["width"]

    assert gradient_error(backward(encode, loss), plain(encode, loss)) <= 1e-6


def refused(encode: Any, loss: Any = gram, kind: type[Exception] = bigbatch.InputError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        backward(encode, loss, **options)
    return str(caught.value)


def test_features_without_a_row_for_each_sample_are_refused() -> None:
    assert refused(lambda model, part: model.left(part["left"]).sum()) == (
        "encode returned a tensor of shape () for a micro-batch of 4 samples: each feature needs one row for each "
        "sample. Reshape several rows of a sample to [samples, rows, ...]."
    )
    for cut, rows in ((4, 8), (22, 44)):
        assert f"a tensor of shape ({rows}, 4) for a micro-batch of {cut} samples" in refused(
            lambda model, part: model.left(part["left"]).repeat(2, 1), cut=cut
        )


def test_features_without_a_tensor_are_refused() -> None:
    assert refused(lambda model, part: {"width": 3}, kind=TypeError) == (
        "encode returned a dict without a tensor: it must return the features of the micro-batch, a tensor "
        "[samples, ...] or a pytree of such tensors."
    )


def test_features_of_different_widths_are_refused() -> None:
    def encode(model: Any, part: Data) -> Tensor:
        return model.left(part["left"]).repeat(1, len(part["left"]))

    assert refused(encode) == (
        "encode returned features of different shapes or dtypes for two micro-batches (a tensor of shape (4, 16) in "
        "torch.float64 and a tensor of shape (2, 8) in torch.float64): the loss needs all of them as one tensor. Pool "
        "or pad them to one size for every sample."
    )


def test_constants_that_differ_are_refused() -> None:
    def encode(model: Any, part: Data) -> Any:
        return model.left(part["left"]), [str(label.item()) for label in part["label"]]

    assert "Values that differ by sample must be tensors [samples, ...]." in refused(encode)
    assert "encode returned 4 among the features of one micro-batch, and something else" in refused(
        lambda model, part: (model.left(part["left"]), len(part["left"]))
    )


def test_encode_with_hidden_state_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def encode(model: Any, part: Data) -> Tensor:
        features = model.left(part["left"])
        return features * torch.rand(len(features), 1, generator=generator, dtype=features.dtype)

    message = refused(encode)
    assert re.sub(r"\d\.\de[+-]\d\d", "X", message) == (
        "encode returned other features in its second pass (relative difference X), so the gradient would be wrong: it "
        "depends on something else than the model, the micro-batch and the global random generators. Draw from those "
        "instead of a torch.Generator, and keep no state in attributes."
    )


def test_refused_window_changes_nothing() -> None:
    model, generator = towers(), torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in model.parameters()]

    def encode(model: Any, part: Data) -> Tensor:
        return model.left(part["left"]) * torch.rand((), generator=generator, dtype=torch.float64)

    engine = bigbatch.Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), bigbatch.Coupled(encode, gram), microbatch=4, check=False
    )
    with pytest.raises(bigbatch.InputError):
        engine.step(batch())
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_loss_of_another_form_is_refused() -> None:
    encode = CASES["clip"].encode
    assert refused(encode, lambda _model, features: features[0].sum(1), kind=ValueError) == (
        "the loss of Coupled has shape (22,): it must be the 0-d loss of the whole batch. Call .mean() on it."
    )
    assert "returned a tuple: it must return a 0-d tensor" in refused(encode, lambda *_: (0, 1), kind=TypeError)


def test_loss_without_gradient_is_refused() -> None:
    message = refused(two_towers, lambda _model, features: features[0].detach().sum(), kind=ValueError)
    assert message.startswith("the loss does not depend on any parameter that requires a gradient")


def test_settings_that_are_not_supported_are_refused() -> None:
    coupled = bigbatch.Coupled(two_towers, CASES["clip"].loss)
    with pytest.raises(bigbatch.InputError, match="cuda_graphs=True is not supported for a Coupled loss"):
        bigbatch.Engine(towers(), None, coupled, microbatch=4, cuda_graphs=True)
    with pytest.raises(bigbatch.InputError, match="count_items= is for losses of several terms"):
        bigbatch.Engine(towers(), None, coupled, microbatch=4, count_items=lambda data: {"loss": 1})
    with pytest.raises(bigbatch.InputError, match='gather is \'some\': it must be "none" or "all"'):
        bigbatch.Coupled(two_towers, gram, gather="some")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss is a int: pass a function loss\(model, features\)"):
        bigbatch.Coupled(two_towers, 3)  # type: ignore[arg-type]


def test_nonfinite_loss_skips_update() -> None:
    model = towers()
    before = [p.detach().clone() for p in model.parameters()]
    engine = bigbatch.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        bigbatch.Coupled(two_towers, lambda _model, features: features[0].sum() * float("nan")),
        microbatch=4,
    )
    assert engine.step(batch()).skipped is not None
    assert all(map(torch.equal, before, model.parameters()))


def test_bfloat16_parameters_sum_in_float32() -> None:
    case = CASES["clip"]
    data = {name: c.bfloat16() if c.is_floating_point() else c for name, c in batch().items()}
    model = towers().to(torch.bfloat16)
    bigbatch.Engine(model, None, bigbatch.Coupled(case.encode, case.loss), microbatch=2, check=False).backward(data)
    reference = towers()
    reference.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    case.loss(reference, case.encode(reference, {n: c.double() for n, c in data.items()})).backward()
    found = [None if p.grad is None else p.grad.double() for p in model.parameters()]
    assert relative_error(found, [p.grad for p in reference.parameters()]) < 0.05


def test_float16_scaler_keeps_small_gradients() -> None:
    case, model, reference = CASES["clip"], towers().float(), towers().float()
    data = {name: c.float() if c.is_floating_point() else c for name, c in batch().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def encode(model: Any, part: Data) -> Any:
        with torch.autocast("cpu", torch.float16):
            return case.encode(model, part)

    def loss(model: Any, features: Any) -> Tensor:
        return 1e-3 * case.loss(model, tuple(feature.float() for feature in features))

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    coupled = bigbatch.Coupled(encode, loss)
    bigbatch.Engine(model, optimizer, coupled, microbatch=4, scaler=scaler, check=False).step(data)
    loss(reference, case.encode(reference, data)).backward()
    for p, old in zip(model.parameters(), before, strict=True):
        p.grad = None if torch.equal(p, old) else old - p.detach()
    assert gradient_error(model, reference) < 0.02


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("after", [0, 3, 6, 9])
def test_window_can_be_abandoned_in_both_passes(after: int, dropout: float) -> None:
    model, calls = towers(dropout), []
    engine = bigbatch.Engine(model, None, bigbatch.Coupled(two_towers, CASES["clip"].loss), microbatch=4, check=False)

    def should_abandon() -> bool:
        calls.append(None)
        return len(calls) > after

    with pytest.raises(bigbatch.WindowAbandonedError):
        engine.backward(batch(), should_abandon=should_abandon)
    assert len(calls) == after + 1
    assert all(p.grad is None for p in model.parameters())
    assert engine.backward(batch()).items == 22


def test_call_on_a_microbatch_is_refused() -> None:
    model, coupled = towers(), bigbatch.Coupled(two_towers, CASES["clip"].loss)
    window = bigbatch.Accumulator(model, None).window()
    with pytest.raises(bigbatch.WindowStateError) as caught:
        window.backward(*coupled(model, batch(4)))
    assert str(caught.value) == (
        "a Coupled loss was called on a micro-batch, whose samples would be compared with each other only: pass it to "
        "bigbatch.Engine or bigbatch.verify, which compute it on the whole batch. The loss itself is "
        "coupled.loss(model, coupled.encode(model, batch))."
    )


def test_outputs_of_transformers_are_features() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def encode(model: Any, part: Data) -> Any:
        left, right = two_towers(model, part)
        return BaseModelOutputWithPooling(last_hidden_state=right, pooler_output=left)

    def loss(_model: Any, features: Any) -> Tensor:
        return gram(None, features.pooler_output + features["last_hidden_state"])

    assert gradient_error(backward(encode, loss), plain(encode, loss)) <= TOLERANCE


def test_packed_rows_have_a_feature_for_each_sample() -> None:
    lengths = [3, 5, 2, 4, 1, 6]
    samples = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).double() for n in lengths]

    def collate(chosen: Any) -> Any:
        return torch.cat(list(chosen)), torch.tensor([len(sample) for sample in chosen])

    def encode(model: Any, part: Any) -> Tensor:
        row, sizes = part
        return torch.stack([model.left(sample).mean(0) for sample in row.split(sizes.tolist())])

    model, reference = towers(), towers()
    bigbatch.Engine(
        model,
        None,
        bigbatch.Coupled(encode, gram),
        microbatch=bigbatch.TokenBudget(8),
        collate=collate,
        lengths=lambda chosen: [len(sample) for sample in chosen],
        layout="packed",
        check=False,
    ).backward(samples)
    gram(reference, encode(reference, collate(samples))).backward()
    assert gradient_error(model, reference) <= TOLERANCE
