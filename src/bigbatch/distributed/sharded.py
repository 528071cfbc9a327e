"""Gradients of models that are sharded by FSDP2 (`fully_shard`), in one dimension or in two (HSDP).

policy → flags before each micro-batch → FSDP reduces within its backward → shards of the mean over ranks
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from bigbatch.distributed.gradient_sync import MultiRankSync, SyncPolicy
from bigbatch.errors import WindowStateError
from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES

if TYPE_CHECKING:
    pass


class ShardedSync(MultiRankSync):
    """Parameters in shards, whole only while a layer runs: every forward and backward is collective.

    FSDP averages gradients over ranks on their way; the update undoes that, and divides by items alone. All ranks run
    as many micro-batches as the one that has most; the others run some again whose gradient counts nothing.

    Args:
        model: With `fully_shard` applied to it, and to its layers.
        policy: When gradients cross ranks. By default with every micro-batch, which keeps the shards alone; in two
            dimensions, between the ranks that shard with every one, and between the replicas with the last.

    Raises:
        TypeError: Some of its parameters are not sharded, or over other ranks than the rest.
        ValueError: The policy is not one for this model, or would sum gradients in 16 bits.
    """

    needs_equal_counts = True
    hides_leaves = True

    def __init__(self, model: nn.Module, *, policy: SyncPolicy | None = None) -> None:
        self._roots = [module for module in model.modules() if isinstance(module, FSDPModule)]
        meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        if whole or len(meshes) != 1:
            what = f"{whole[0]} is not sharded" if whole else f"its parameters are sharded in {len(meshes)} ways"
            raise TypeError(f"{what}: call fully_shard on the layers and then on the model itself, over one mesh.")
        (mesh,) = meshes
        super().__init__(model, None, _group_of(mesh))
        replicas = mesh.ndim > 1
        self.policy = policy or (SyncPolicy.SHARD if replicas else SyncPolicy.EVERY)
        if self.policy is SyncPolicy.SHARD and not replicas:
            raise ValueError(f"sync is {policy}, and this model has no replicas: use LAST or EVERY.")
        self.averaged_over = self._find_divisor()
        self._check_dtypes()
        self._unhook: Any = None
        self._backward_failed = False

    def begin(self) -> None:
        """Stand by where the model gives something, and let every micro-batch reduce that nothing else is said of.

        Raises:
            WindowStateError: Another window over it is open: what FSDP holds for that one would be dropped. Or an
                earlier backward was broken off.
        """
        if self._backward_failed:
            raise WindowStateError(
                "a backward of the sharded model was broken off, and FSDP cannot go on after that: begin again from a "
                "checkpoint, with a model that fully_shard was newly applied to."
            )
        if vars(self.module).setdefault("_bigbatch_window", self) is not self:
            raise WindowStateError(
                "another window over the same sharded model is open, and FSDP adds up the gradients of one at a time. "
                "End it, by its step() or its abort(), before this one begins."
            )
        self._found = [(group, group.reduce_grads, group.all_reduce_grads) for group in self._parameter_groups()]
        self._unhook = self.module.register_forward_hook(self._hook_outputs)
        self._clear_fsdp_state()
        self.before(is_last=True)

    def end(self) -> None:
        """Put the flags back, and drop what a window that was given up left inside FSDP."""
        if vars(self.module).get("_bigbatch_window") is not self:
            return
        del vars(self.module)["_bigbatch_window"]
        for group, reduces, all_reduces in self._found:
            group.reduce_grads, group.all_reduce_grads = reduces, all_reduces
        if self._unhook is not None:
            self._unhook.remove()
            self._unhook = None
        self._clear_fsdp_state()

    def before(self, *, is_last: bool) -> None:
        """Tell FSDP whether the next backward reduces."""
        reduces = is_last or self.policy is not SyncPolicy.LAST
        for root in self._roots:
            root.set_requires_gradient_sync(reduces, recurse=False)
            if self.policy is SyncPolicy.SHARD:
                root.set_requires_all_reduce(is_last, recurse=False)
        self.crosses = reduces

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Note a backward that was broken off; speak again after one that was silent."""
        self._backward_failed = True
        yield
        self._backward_failed = self.is_silent = False

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Compute the 2-norm of whole gradients from their shards, 0-d. Collective."""
        total = torch.nn.utils.get_total_norm(gradients)
        return total.full_tensor() if isinstance(total, DTensor) else total

    def _hook_outputs(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Be there where gradients enter the model; outputs are not kept, which may be large."""
        for leaf in pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._zero_if_padding)  # type: ignore[no-untyped-call]

    def _zero_if_padding(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.is_silent else None

    def _clear_fsdp_state(self) -> None:
        for group in self._parameter_groups():
            group._partial_reduce_output = None
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # from the first forward on
                    parameter._unsharded_param.grad = None

    def _parameter_groups(self) -> Iterator[Any]:
        for root in self._roots:
            state = root._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # several a module from torch 2.13 on
            yield from groups if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]

    def _find_divisor(self) -> float:
        """Find what FSDP divides by on the way: the ranks, or what the model was told instead."""
        factors = {group.gradient_divide_factor for group in self._parameter_groups()}
        if len(factors) != 1:
            raise TypeError("the layers of the model divide gradients by different factors: set one for all.")
        (factor,) = factors
        return float(self.size if factor is None else factor)

    def _check_dtypes(self) -> None:
        for group in self._parameter_groups():
            for parameter in group.fsdp_params:
                policy = group.mp_policy
                dtype = policy.reduce_dtype or policy.param_dtype or parameter.sharded_param.dtype
                if dtype in HALF_PRECISION_DTYPES and self.policy is not SyncPolicy.EVERY:
                    raise ValueError(
                        f"sync={self.policy} would sum the gradients of micro-batches in {dtype}. Pass "
                        "mp_policy=MixedPrecisionPolicy(..., reduce_dtype=torch.float32) to fully_shard."
                    )


def _group_of(mesh: Any) -> Any:
    if mesh.size() == dist.get_world_size():
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
