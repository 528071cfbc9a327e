"""The command ``bigbatch`` with all ranks of torchrun on the first CUDA card, over gloo: to try several ranks on one.

    torchrun --nproc-per-node 2 benchmarks/one_card.py train ...

NCCL refuses two ranks on one card. gloo sends tensors of a card through host memory, so times are not those of NCCL.
"""

import sys
from typing import Any

import torch

from bigbatch.cli import main, torchrun

_init_process_group = torchrun._init_process_group


def _set_first_device(_config: Any) -> bool:
    torch.cuda.set_device(0)
    return True


def _init_gloo(rank: int, size: int, *, on_cuda: bool, timeout_s: float) -> None:
    del on_cuda  # for NCCL
    _init_process_group(rank, size, on_cuda=False, timeout_s=timeout_s)


if __name__ == "__main__":
    if torch.cuda.is_available():
        torchrun._set_local_device = _set_first_device
    torchrun._init_process_group = _init_gloo
    sys.exit(main())
