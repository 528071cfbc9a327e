"""Gradient synchronization of models that are sharded by FSDP2 (`fully_shard`), in one dimension or two (HSDP).

policy → flags before each micro-batch → FSDP reduces in backward → shards of the mean over ranks
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from bigbatch.distributed.gradient_sync import Microbatch, MultiRankSync, SyncPolicy
from bigbatch.errors import WindowStateError
from bigbatch.gradients.gradient_sums import HALF_PRECISION_DTYPES
from bigbatch.gradients.loss_totals import may_have_items
from bigbatch.types import Terms

if TYPE_CHECKING:
    from bigbatch.gradients.gradient_sums import GradientSums

KEPT_SHARE = 8  # what is kept whole may take one part in so many of a device's memory


class ShardedSync(MultiRankSync):
    """A model in shards, gathered layer by layer: every forward and backward is collective.

    FSDP averages gradients over ranks when it reduces them; the update undoes that and divides by items only. All ranks
    run as many micro-batches as the rank with the most; the others repeat a padding micro-batch whose gradient is zero.

    Args:
        model: With `fully_shard` applied to it, and to its layers.
        policy: When gradients are reduced. By default with every micro-batch, which holds shards only; in two
            dimensions, between the ranks that shard with every micro-batch, and between the replicas with the last.
        keeps_weights: Whether the gathered weights stay on the device from the first micro-batch of a window to the
            last, so that they are gathered once a window instead of twice a micro-batch. By default if they take at
            most an eighth of the memory of a CUDA device.

    Raises:
        TypeError: A parameter is not sharded, or is sharded over other ranks than the rest.
        ValueError: The model does not support the policy, or it would sum gradients in 16 bits.
    """

    is_sharded = True
    runs_in_lockstep = True
    parameters_are_wrapped = True

    def __init__(
        self, model: nn.Module, *, policy: SyncPolicy | None = None, keeps_weights: bool | None = None
    ) -> None:
        self._roots: list[FSDPModule] = [module for module in model.modules() if isinstance(module, FSDPModule)]
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
        self.gradient_divide_factor = self._find_divide_factor()
        self._check_dtypes()
        device = next(iter(self.module.parameters())).device
        self._keeps_weights = self.fits_whole(device) if keeps_weights is None else keeps_weights
        self._kept: list[tuple[FSDPModule, bool]] = []
        self._padding_microbatch: Any = None
        self._zero_gradient = False
        self._unhook: Any = None
        self._backward_failed = False

    @property
    def needs_padding_microbatch(self) -> bool:
        """Whether no padding micro-batch was set."""
        return self._padding_microbatch is None

    @property
    def padding_microbatch(self) -> Any:
        """The micro-batch that is run in place of missing ones; None if none was set."""
        return self._padding_microbatch

    def set_padding_microbatch(self, microbatch: Any) -> None:
        """Set the micro-batch that is run in place of missing ones, on the device."""
        self._padding_microbatch = microbatch

    def start_window(self) -> None:
        """Hook the model outputs and reduce gradients in every backward by default.

        Raises:
            WindowStateError: Another window over the model is open, whose gradients in FSDP would be dropped; or an
                earlier backward failed.
        """
        if self._backward_failed:
            raise WindowStateError(
                "a backward of the sharded model failed, and FSDP cannot continue after that: start again from a "
                "checkpoint, with a model that fully_shard was newly applied to."
            )
        if vars(self.module).setdefault("_bigbatch_window", self) is not self:
            raise WindowStateError(
                "another window over the same sharded model is open, and FSDP sums the gradients of one at a time. "
                "End it, by its step() or its abort(), before this one begins."
            )
        self._found = [(group, group.reduce_grads, group.all_reduce_grads) for group in self._parameter_groups()]
        self._unhook = self.module.register_forward_hook(self._hook_outputs)
        self._clear_fsdp_state()
        self._set_reduction(is_last=True)
        if self._keeps_weights:
            self._kept = list(self._roots_that_gather_again())
        for root, _ in self._kept:
            root.set_reshard_after_forward(False, recurse=False)

    def end_window(self) -> None:
        """Restore the flags, and drop what an abandoned window left inside FSDP."""
        if vars(self.module).get("_bigbatch_window") is not self:
            return
        del vars(self.module)["_bigbatch_window"]
        for group, reduces, all_reduces in self._found:
            group.reduce_grads, group.all_reduce_grads = reduces, all_reduces
        if self._unhook is not None:
            self._unhook.remove()
            self._unhook = None
        for root, gathers_again in self._kept:
            root.set_reshard_after_forward(gathers_again, recurse=False)
            root.set_reshard_after_backward(True, recurse=False)
            root.reshard()  # no-op after the last backward of a window that ended
        self._kept = []
        self._clear_fsdp_state()

    def turns(
        self, own: Sequence[Any], max_num_microbatches: int, should_abandon: Callable[[], bool]
    ) -> Generator[Microbatch, None, bool]:
        """Yield this rank's micro-batches and then padding, as many as any rank has; also if the window is abandoned.

        The other ranks wait in the layers of the model, so no rank may stop early.
        """
        is_abandoned = False
        for index in range(max_num_microbatches):
            is_abandoned = should_abandon() or is_abandoned
            self._set_reduction(is_last=index == max_num_microbatches - 1)
            counts = index < len(own)
            yield Microbatch(own[index] if counts else self._padding_microbatch, counts)
        return is_abandoned

    def loss_to_differentiate(self, loss: Tensor | None, terms: Terms) -> Tensor | None:
        """Add the terms without items as zeros: other ranks may run backward through their layers."""
        for unused in (loss_sum for loss_sum, items in terms.values() if loss is None or not may_have_items(items)):
            loss = unused * 0.0 if loss is None else loss + unused * 0.0
        return loss

    @contextmanager
    def backward(self, *, counts: bool) -> Iterator[None]:
        """Send a zero gradient into the model if the micro-batch does not count; remember a backward that failed."""
        self._backward_failed, self._zero_gradient = True, not counts
        yield
        self._backward_failed = self._zero_gradient = False

    def reduce(self, sums: "GradientSums", has_gradient: Sequence[bool], *, has_items: bool = True) -> bool:
        """Free weights that are still gathered: those of modules that did not run in the last micro-batch."""
        for root, _ in self._kept:
            root.reshard()
        return False

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the 2-norm of whole gradients from their shards, 0-d. Collective."""
        total = torch.nn.utils.get_total_norm(gradients)
        return total.full_tensor() if isinstance(total, DTensor) else total

    def _set_reduction(self, *, is_last: bool) -> None:
        """Set whether FSDP reduces in the next backward."""
        self.syncs_in_backward = is_last or self.policy is not SyncPolicy.LAST
        for root in self._roots:
            root.set_requires_gradient_sync(self.syncs_in_backward, recurse=False)
            if self.policy is SyncPolicy.SHARD:
                root.set_requires_all_reduce(is_last, recurse=False)
        for root, _ in self._kept:
            root.set_reshard_after_backward(is_last, recurse=False)

    def _hook_outputs(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Register gradient hooks on the outputs without keeping references to them."""
        for leaf in pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._zero_if_padding)  # type: ignore[no-untyped-call]

    def _zero_if_padding(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self._zero_gradient else None

    def _clear_fsdp_state(self) -> None:
        for group in self._parameter_groups():
            group._partial_reduce_output = None
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # from the first forward on
                    parameter._unsharded_param.grad = None

    def _parameter_groups(self) -> Iterator[Any]:
        for root in self._roots:
            yield from self._groups_of(root)

    @staticmethod
    def _groups_of(root: FSDPModule) -> Iterator[Any]:
        state = root._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # several a module from torch 2.13 on
        yield from groups if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]

    def _roots_that_gather_again(self) -> Iterator[tuple[FSDPModule, bool]]:
        """Yield the modules whose weights can be kept, and whether FSDP frees them after forward.

        None before the first forward, which decides that; and none that FSDP shards over other ranks after forward.
        """
        for root in self._roots:
            state = root._get_fsdp_state()
            groups = list(self._groups_of(root))
            if state._is_root is None or any(g.post_forward_mesh_info not in (None, g.mesh_info) for g in groups):
                continue
            yield root, any(group.post_forward_mesh_info is not None for group in groups)

    def fits_whole(self, device: torch.device, *, gradients: bool = False) -> bool:
        """Return whether gathered weights take at most an eighth of the memory of a CUDA device; False for others.

        Args:
            device: Of this rank; the model may still be on the meta device.
            gradients: Whether to count whole gradients in float32 as well.
        """
        if device.type != "cuda":
            return False
        more = torch.float32.itemsize if gradients else 0
        kept = sum(
            parameter._orig_size.numel()
            * ((group.mp_policy.param_dtype or parameter.sharded_param.dtype).itemsize + more)
            for group in self._parameter_groups()
            for parameter in group.fsdp_params
        )
        return bool(kept * KEPT_SHARE <= torch.cuda.get_device_properties(device).total_memory)

    def _find_divide_factor(self) -> float:
        """Return what FSDP divides gradients by: the number of ranks, or the factor that was set on the model."""
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
