"""Functions that ranks run in test_sharded_faults.py: checkpoints of two ranks without a model, and their faults."""

import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from bigbatch.lm.checkpoint import newest, read, verify, write
from bigbatch.lm.checkpoint.hashed_file import HashedFile
from bigbatch.lm.checkpoint.safetensors_file import NAMES
from bigbatch.lm.checkpoint.sharded_reader import read_into
from bigbatch.lm.checkpoint.sharded_writer import write_sharded
from support.checkpoints import RUN_ID, DiskOperations, bits, names_in, no_space, tensors_of, values_of

PARTS = [f"{part}-rank-{rank}-of-2.safetensors" for part in ("model", "optimizer") for rank in (0, 1)]
FILES = [*PARTS, "state.json", "order.json", "manifest.json"]


def shards_of(step: int) -> dict[str, dict[str, Tensor]]:
    """Return `tensors_of` sharded over the ranks; 0-d tensors stay plain."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        part: {name: distribute_tensor(t, mesh, [Shard(0)]) if t.dim() else t for name, t in named.items()}
        for part, named in tensors_of(step).items()
    }


def save(folder: Path, step: int, run_id: str = RUN_ID) -> Path:
    return write_sharded(folder, step, run_id=run_id, tensors=shards_of(step), values=values_of(step))


def save_all(folder: Path, *steps: int) -> list[Path]:
    return [save(folder, step) for step in steps]


def error_of(do: Callable[[], Any]) -> tuple[str, str] | None:
    try:
        do()
    except BaseException as error:  # noqa: BLE001 - checked by the test
        return type(error).__name__, str(error)
    return None


# every kind ------------------------------------------------------------------------------------------------------


def every_kind(folder: Path) -> None:
    """Write and read tensors of every dtype: sharded by rows and columns, replicated, empty and 0-d."""
    mesh = init_device_mesh("cpu", (2,))
    made = torch.Generator().manual_seed(0)
    plain: dict[str, Tensor] = {}
    cut: dict[str, Tensor] = {}
    for dtype, kind in NAMES.items():
        raw = torch.randint(0, 256, (15, dtype.itemsize), dtype=torch.uint8, generator=made)
        flat = (raw[:, 0] > 127) if dtype == torch.bool else raw.view(dtype).reshape(15)
        for shape, view in {"rows": flat.view(5, 3), "row": flat[:3].view(1, 3), "empty": flat[:0].view(0, 2)}.items():
            for dim in (0, 1):
                plain[f"{kind}/{shape}/{dim}"] = view
                own = view.tensor_split([(view.shape[dim] + 1) // 2], dim)[dist.get_rank()]
                cut[f"{kind}/{shape}/{dim}"] = DTensor.from_local(
                    own, mesh, [Shard(dim)], shape=view.shape, stride=view.stride(), run_check=False
                )
        plain |= {f"{kind}/replica": flat, f"{kind}/0-d": flat[3], f"{kind}/0-d/replica": flat[4]}
        cut[f"{kind}/replica"] = DTensor.from_local(flat, mesh, [Replicate()], run_check=False)
        cut[f"{kind}/0-d"] = flat[3] if dist.get_rank() == 0 else flat[5]  # the first rank's counts
        cut[f"{kind}/0-d/replica"] = DTensor.from_local(flat[4], mesh, [Replicate()], run_check=False)
    path = write_sharded(folder, 1, run_id=RUN_ID, tensors={"all": cut, "nothing": {}}, values={})
    assert verify(path) is None
    whole = read(path)
    assert whole.tensors["nothing"] == {}
    locals_before = {name: bits(local(t)) for name, t in cut.items()}
    for named in (whole.tensors["all"], zeroed(plain), zeroed(cut)):
        if named is not whole.tensors["all"]:
            assert read_into(path, named).tensors == {"all": named}
        for name, tensor in named.items():
            expected = locals_before[name] if isinstance(tensor, DTensor) else bits(plain[name])
            assert (bits(local(tensor)), tensor.dtype, tensor.shape) == (expected, plain[name].dtype, plain[name].shape)


def zeroed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def zero(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=torch.uint8).to(tensor.dtype)

    return {
        name: DTensor.from_local(
            zero(t.to_local()), t.device_mesh, t.placements, shape=t.shape, stride=t.stride(), run_check=False
        )
        if isinstance(t, DTensor)
        else zero(t)
        for name, t in tensors.items()
    }


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read_by_the_reader_of_dcp(folder: Path) -> bool:
    import torch.distributed.checkpoint as dcp

    path = save(folder, 1)
    named = {name: t for part in shards_of(2).values() for name, t in part.items()}
    dcp.load(named, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    expected = {name: t for part in shards_of(1).values() for name, t in part.items()}
    return all(bits(local(t)) == bits(local(expected[name])) for name, t in named.items())


# what goes wrong -------------------------------------------------------------------------------------------------


def no_space_at_every_point(root: Path, failing: int) -> tuple[list[str], list[str]]:
    """Fail one rank at each point in turn; return all points, and those at which the write still succeeded."""
    survived: list[str] = []
    number = 0
    while True:
        folder = root / str(number) / "run" / "checkpoints"
        if dist.get_rank() == 0:
            folder.parent.mkdir(parents=True)
        save(folder, 1)
        tensors = shards_of(2)
        with pytest.MonkeyPatch.context() as patch:
            points = DiskOperations(patch, no_space, at=number if dist.get_rank() == failing else -1)
            words = {"run_id": RUN_ID, "tensors": tensors, "values": values_of(2)}
            said = error_of(lambda folder=folder, words=words: write_sharded(folder, 2, **words))
        told: list[Any] = [points.seen]
        dist.broadcast_object_list(told, src=failing)
        if number >= len(told[0]):
            return told[0], survived
        point = told[0][number]
        if said is None:
            survived.append(point)
        else:
            why = f"rank {failing}: no space left on device; the last valid one is step-1."
            assert said == ("CheckpointError", f"checkpoint step-2 could not be written to {folder}: {why}")
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, said)
        assert everywhere == [said] * len(everywhere), point
        named = said is None or "rename step-2.partial" in told[0][:number]
        assert names_in(folder) == ({"step-1", "step-2"} if named else {"step-1"}), point
        assert all(verify(path) is None for path in folder.iterdir()), point
        dist.barrier()
        save(folder, 2)
        assert newest(folder) == (folder / "step-2", []), point
        assert names_in(folder) == {"step-1", "step-2"}, point
        number += 1


def file_too_large(folder: Path, failing: int) -> list[Any]:
    """Write under a kernel limit of file size on one rank."""
    save(folder, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    said = error_of(lambda: save(folder, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return [said, sorted(names_in(folder)), newest(folder)]


def raise_on_one(folder: Path, failing: int) -> list[Any]:
    """Return the errors of all ranks when one raises an error that is not an OSError."""
    save(folder, 1)
    said = []
    for error in (MemoryError("32 GiB"), KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("CUDA")):
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == failing:

                def fail(*_: Any, error: BaseException = error) -> None:
                    raise error

                patch.setattr(HashedFile, "write", fail)
            said.append(error_of(lambda: save(folder, 2)))
        dist.barrier()
        assert names_in(folder) == {"step-1"}
    return said


def refuse(folder: Path) -> list[Any]:
    """Return the errors of invalid arguments on one rank or on all."""
    mesh = init_device_mesh("cpu", (2,))
    first = dist.get_rank() == 0
    rows = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)
    words: list[dict[str, Any]] = [
        {"tensors": {"model": {"x": rows if first else [1.0]}}},
        {"tensors": {"model": {"x": DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)}}},
        {"tensors": {"model": {"x": rows}, "optimizer": {"x": rows}}},
        {"tensors": {"model": {"x": rows} if first else {}}},
        {"tensors": {"manifest/": {"x": rows}}},
        {"values": {"state": (1, 2)}},
        {"run_id": "" if not first else RUN_ID},
        {"step": -1},
    ]
    said = []
    for each in words:
        given = {"step": 1, "run_id": RUN_ID, "tensors": {"model": {"x": rows}}, "values": {}} | each
        said.append(error_of(lambda given=given: write_sharded(folder, **given)))
        dist.barrier()
        assert not folder.exists()
    return said


def separate_disks(two: Path, root: Path) -> list[Any]:
    """Give the ranks different folders of the same name, as on different disks."""
    own = root / str(dist.get_rank())
    shutil.copytree(two, own)
    if dist.get_rank() == 1:
        shutil.rmtree(own / "step-2")
        write(own, 2, run_id="other", tensors=tensors_of(2), values=values_of(2))
        (own / "step-3.partial").mkdir()
    dist.barrier()
    return [error_of(lambda: save(own, 3)), error_of(lambda: read_into(own / "step-2", {}))]


def refuse_another_run(folder: Path) -> Any:
    save(folder, 1, run_id="other")
    inode = (folder / "step-1" / "manifest.json").stat().st_ino
    save(folder, 1, run_id="other")
    assert (folder / "step-1" / "manifest.json").stat().st_ino == inode
    return error_of(lambda: save(folder, 1))


def read_each(*paths: Path) -> list[Any]:
    """Return the error of `read_into` for each path; assert that an error changes no tensor."""
    found = []
    for path in paths:
        named = {name: t for part in shards_of(7).values() for name, t in part.items()}
        before = [bits(local(t)) for t in named.values()]
        found.append((error_of(lambda path=path, named=named: read_into(path, named)),))
        assert (before == [bits(local(t)) for t in named.values()]) == (found[-1][0] is not None)
    return found


def refuse_to_fill(path: Path) -> list[Any]:
    """Return the errors of tensors with wrong shapes, dtypes and names, also on one rank only."""
    named = {name: t for part in shards_of(7).values() for name, t in part.items()}
    first = dist.get_rank() == 0
    others: list[dict[str, Tensor]] = [
        {"weight": torch.zeros(5, 8)},
        {"bias": torch.zeros(3, dtype=torch.int64)},
        {"new": torch.zeros(3)},
        {} if first else {"new": torch.zeros(3)},
        {"weight": torch.zeros(5, 7, device="meta")},
    ]
    said = []
    for other in others:
        before = [bits(local(t)) for t in named.values()]
        said.append(error_of(lambda other=other: read_into(path, named | other)))
        assert before == [bits(local(t)) for t in named.values()]
    return said


# nothing runs, and nothing more than is needed -------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def unpickled(path: Path) -> tuple[Any, int, int]:
    """Return the error, and the number of names unpickled before and after a control unpickling."""
    named = {name: t for part in shards_of(7).values() for name, t in part.items()}
    found: list[str] = []
    sys.addaudithook(lambda event, _: found.append(event) if event == "pickle.find_class" else None)
    said = error_of(lambda: read_into(path, named))
    assert said == error_of(lambda: read(path))
    newest(path.parent)
    before = len(found)
    pickle.loads(pickle.dumps(Path))
    return said, before, len(found)


def counted(folder: Path) -> dict[str, Any]:
    """Return the collectives of a write and a read, the largest slice read, and the files hashed."""
    from bigbatch.lm.checkpoint import sharded_reader

    sent: list[str] = []
    hashed: list[str] = []
    slices: list[int] = []
    named = {name: t for part in shards_of(7).values() for name, t in part.items()}
    with pytest.MonkeyPatch.context() as patch:
        for collective in ("all_gather", "broadcast"):
            real = getattr(dist, collective)
            patch.setattr(dist, collective, lambda *a, r=real, n=collective, **k: (sent.append(n), r(*a, **k))[1])
        digest = sharded_reader.check_digest
        patch.setattr(sharded_reader, "check_digest", lambda name, *rest: (hashed.append(name), digest(name, *rest))[1])
        real_header = sharded_reader._header

        def header(path: Path, name: str) -> Any:
            return Watched(real_header(path, name), slices)

        patch.setattr(sharded_reader, "_header", header)
        path = save(folder, 1)
        written, sent[:] = list(sent), []
        read_into(path, named)
    return {"write": written, "read": sent, "hashed": hashed, "largest": max(slices)}


class Watched:
    """A tensor file that records the number of elements of each read."""

    def __init__(self, real: Any, sizes: list[int]) -> None:
        self._real, self._sizes = real, sizes

    def __enter__(self) -> "Watched":
        self._file = self._real.__enter__()
        return self

    def __exit__(self, *words: Any) -> Any:
        return self._real.__exit__(*words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> Any:
        view, sizes = self._file.get_slice(name), self._sizes

        class View:
            get_shape, get_dtype = view.get_shape, view.get_dtype

            def __getitem__(self, slices: Any) -> Tensor:
                piece = view[slices]
                sizes.append(piece.numel())
                return piece

        return View()
