"""Checkpoints: what goes in comes out, what is broken is found and named, and nothing that is read runs."""

import hashlib
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigbatch
from bigbatch.errors import CheckpointError
from bigbatch.lm.checkpoint import list_all, newest, prune, read, verify, write
from bigbatch.lm.checkpoint import manifest as manifests
from bigbatch.lm.checkpoint.integrity import NewerCheckpointError
from bigbatch.lm.checkpoint.json_values import DEEPEST, to_json
from bigbatch.lm.checkpoint.manifest import Stamp
from bigbatch.lm.checkpoint.safetensors_file import NAMES
from support.checkpoints import (
    FILES,
    RUN_ID,
    assert_holds,
    assert_same,
    edit_manifest,
    names_in,
    save,
    tensors_of,
    values_of,
)
from support.command_line import completed
from support.forked_processes import script


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with step-1 and step-2, to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, 1)
    save(folder, 2)
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two, tmp_path / "checkpoints")


# there and back --------------------------------------------------------------------------------------------------


def of_every_kind() -> dict[str, torch.Tensor]:
    """Random bits of every dtype, in every shape that a state may have."""
    made = torch.Generator().manual_seed(0)
    kinds: dict[str, torch.Tensor] = {}
    for dtype, name in NAMES.items():
        raw = torch.randint(0, 256, (48, dtype.itemsize), dtype=torch.uint8, generator=made)
        flat = (raw[:, 0] > 127) if dtype == torch.bool else raw.view(dtype).reshape(48)
        kinds |= {f"{name}/flat": flat, f"{name}/0-d": flat[3], f"{name}/empty": flat[:0].reshape(0, 3)}
        kinds |= {f"{name}/strided": flat.reshape(6, 8).T, f"{name}/step": flat[1::3], f"{name}/odd": flat[1:6]}
    return kinds


def test_every_dtype_and_shape_loads_bit_identically(tmp_path: Path) -> None:
    kinds = of_every_kind()
    kinds |= {"conjugate": torch.tensor([1 + 2j]).conj(), "imaginary": torch.tensor([1 + 2j]).conj().imag}
    kinds |= {"parameter": torch.nn.Parameter(torch.ones(2)), "expanded": torch.tensor(2.5).expand(3, 2)}
    path = write(tmp_path, 7, run_id=RUN_ID, tensors={"all": kinds, "nothing": {}}, values={})
    assert verify(path) is None
    assert_same(read(path).tensors, {"all": kinds, "nothing": {}})
    read(path).tensors["all"]["F32/flat"].add_(1)  # its memory is its own


def test_files_have_safetensors_size_and_load_with_it(tmp_path: Path) -> None:
    kinds = {name: tensor.contiguous().clone() for name, tensor in of_every_kind().items()}
    path = write(tmp_path, 0, run_id=RUN_ID, tensors={"all": kinds}, values={})
    ours, theirs = (path / "all.safetensors").read_bytes(), safetensors.torch.save(kinds)
    (size,), (other,) = struct.unpack("<Q", ours[:8]), struct.unpack("<Q", theirs[:8])
    assert len(ours) == len(theirs)
    assert size % 8 == other % 8 == 0
    assert json.loads(ours[8 : 8 + size]).keys() == json.loads(theirs[8 : 8 + other]).keys()
    assert_same({"all": safetensors.torch.load_file(path / "all.safetensors")}, {"all": kinds})


def test_tensors_sharing_storage_load_with_their_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    shared = {"whole": whole, "tied": whole, "row": whole[1], "overlapping": whole.reshape(-1)[2:9]}
    path = write(tmp_path, 1, run_id=RUN_ID, tensors={"model": shared}, values={})
    assert_same(read(path).tensors, {"model": shared})


@pytest.mark.gpu
def test_gpu_tensors_load_on_cpu(tmp_path: Path) -> None:
    named = {name: tensor.cuda() for name, tensor in of_every_kind().items()}
    path = write(tmp_path, 1, run_id=RUN_ID, tensors={"model": named}, values={})
    assert_same(read(path).tensors, {"model": named})


DTYPES = sorted({kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)} - {*NAMES}, key=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsupported_dtype_is_rejected(dtype: torch.dtype, tmp_path: Path) -> None:
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch deprecates or calls experimental
            tensor = torch.empty(4, dtype=dtype)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        pytest.skip(f"torch makes no such tensor: {str(error)[:60]}")
    with pytest.raises(TypeError, match=r"^model: x is "):
        write(tmp_path, 1, run_id=RUN_ID, tensors={"model": {"x": tensor}}, values={})
    assert names_in(tmp_path) == set()


class Own(torch.Tensor):
    """A kind of tensor that nobody but its library knows."""


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        ({1: torch.ones(1)}, TypeError, "model has a tensor called 1, a int: use str names."),
        ({"x": [1.0]}, TypeError, "model: x is a list and not a plain tensor"),
        ({"x": torch.ones(2).as_subclass(Own)}, TypeError, "model: x is a Own and not a plain tensor"),
        ({"x": torch.eye(2).to_sparse()}, TypeError, "model: x is sparse or quantized: pass it dense."),
        ({"x": torch.ones(2, device="meta")}, ValueError, "model: x is on the meta device and has no values."),
        ({"__metadata__": torch.ones(1)}, ValueError, "a name that safetensors reserves."),
        ({"\ud800": torch.ones(1)}, ValueError, r"model has a tensor called '\ud800', which UTF-8 cannot hold."),
    ],
)
def test_unstorable_content_is_rejected_before_writing(
    tensors: Any, kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        write(tmp_path / "new", 1, run_id=RUN_ID, tensors={"model": tensors}, values=values_of(1))
    assert said in str(caught.value)
    assert names_in(tmp_path) == set()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=JSON)
@settings(max_examples=200, deadline=None)
def test_json_values_round_trip(value: Any) -> None:
    assert repr(json.loads(to_json("state", value))) == repr(value)  # repr tells -0.0, nan and True from 1


def test_checkpoint_values_round_trip(tmp_path: Path) -> None:
    state = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "tiny": 5e-324,
        "-0": -0.0,
        "ключ": "☃\u2028\x00",
        "": 10**99,
    }
    values = {"a-list": [], "none": None, "state": state}
    contents = read(write(tmp_path, 3, run_id="für", tensors={}, values=values))
    assert repr(contents.values) == repr(values)
    assert (contents.run_id, contents.tensors) == ("für", {})


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({"a": {3: 1}}, TypeError, "state.a has the key 3, a int, which JSON would turn into text: use str keys."),
        ({"a": [0, (1, 2)]}, TypeError, "state.a[1] is a tuple, which JSON cannot store. Use a list, a dict"),
        ({"a": torch.ones(1)}, TypeError, "state.a is a Tensor, which JSON cannot store"),
        ({"a": {1}}, TypeError, "state.a is a set, "),
        ({"a": b""}, TypeError, "state.a is a bytes, "),
        ("\ud83d\ude00", ValueError, "state is text with half a surrogate pair, which UTF-8 cannot hold."),
        ({"\udfff": 1}, ValueError, "a key of state is text with half a surrogate pair"),
        (
            {"a": [10**5000]},
            ValueError,
            "state.a[0] is a whole number of more digits than Python reads: store it as text.",
        ),
    ],
)
def test_values_changed_by_json_are_rejected(value: Any, kind: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        write(tmp_path, 1, run_id=RUN_ID, tensors={}, values={"state": value})
    assert said in str(caught.value)
    assert names_in(tmp_path) == set()


def test_value_nesting_is_limited(tmp_path: Path) -> None:
    value: Any = []
    for _ in range(DEEPEST):
        value = [value]
    assert read(write(tmp_path, 1, run_id=RUN_ID, tensors={}, values={"state": value})).values["state"] == value
    endless: dict[str, Any] = {}
    endless["me"] = endless
    for deep in ([value], endless):
        with pytest.raises(ValueError, match="is nested more than 100 levels deep: store it flatter"):
            write(tmp_path, 2, run_id=RUN_ID, tensors={}, values={"state": deep})


@pytest.mark.parametrize("name", ["", "manifest", "a/b", "..", "A", "a.b", "é", "a" * 65])
def test_ambiguous_part_name_is_rejected(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a part of a checkpoint cannot be called"):
        write(tmp_path, 1, run_id=RUN_ID, tensors={}, values={name: 1})


@pytest.mark.parametrize(("step", "run_id"), [(-1, "a"), (1, ""), (1, "a\nb"), (1, "\ud800")])
def test_step_and_run_id_are_required(step: int, run_id: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^(step|run_id)="):
        write(tmp_path, step, run_id=run_id, tensors={}, values={})


# twice -----------------------------------------------------------------------------------------------------------


def test_intact_checkpoint_is_kept_and_broken_one_replaced(folder: Path) -> None:
    path = folder / "step-2"
    before = (path / "manifest.json").stat().st_ino
    assert save(folder, 2) == path
    assert (path / "manifest.json").stat().st_ino == before
    (path / "state.json").write_bytes(b"{}")
    (folder / "step-9.deleted").mkdir()
    (folder / "step-9.deleted" / "model.safetensors").touch()
    (folder / "step-9.partial").mkdir()
    assert save(folder, 2) == path
    assert_holds(path, 2)
    assert names_in(folder) == {"step-1", "step-2"}


def test_leftovers_with_other_content_stay(folder: Path) -> None:
    (folder / "step-8.partial").mkdir()
    (folder / "step-8.partial" / "notes.txt").touch()
    (folder / "step-8.deleted").touch()
    (folder / "step-7.deleted").symlink_to(folder / "step-1")
    before = names_in(folder)
    save(folder, 3)
    assert names_in(folder) == before | {"step-3"}
    assert_holds(folder / "step-1", 1)


def test_checkpoint_of_another_run_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"belongs to run a-run, not to run other: remove it"):
        save(folder, 2, run_id="other")
    assert_holds(folder / "step-2", 2)


def test_file_at_checkpoint_path_is_renamed(folder: Path) -> None:
    (folder / "step-3").write_text("notes", encoding="utf-8")
    (folder / "step-3.kept").touch()
    assert verify(folder / "step-3") == f"{folder / 'step-3'} is not a folder"
    assert_holds(save(folder, 3), 3)
    assert (folder / "step-3.kept-2").read_text(encoding="utf-8") == "notes"


@pytest.mark.parametrize("kind", ["folder of notes", "extra file", "link to a checkpoint", "damaged manifest"])
def test_foreign_checkpoint_path_is_renamed(kind: str, folder: Path) -> None:
    path = folder / "step-2"
    if kind == "folder of notes":
        shutil.rmtree(path)
        path.mkdir()
        (path / "notes.txt").touch()
    elif kind == "extra file":
        (path / "notes.txt").touch()
    elif kind == "link to a checkpoint":
        path.rename(folder.parent / "step-2")
        path.symlink_to(folder.parent / "step-2")
    else:
        (path / "manifest.json").write_bytes(b"{}")
    before = names_in(path)
    assert_holds(save(folder, 2), 2)
    assert names_in(folder / "step-2.kept") == before


def test_linked_folder_of_checkpoints_is_refused(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "linked"
    link.symlink_to(folder)
    sentence = (
        f"{link} is a link, and links in a run directory are not followed. Move the folder that it points to here; to "
        "keep a run on another disk, link the whole run directory."
    )
    for use in (newest, list_all, lambda path: save(path, 3), lambda path: prune(path, keep=1, run_id=RUN_ID)):
        with pytest.raises(CheckpointError) as caught:
            use(link)
        assert str(caught.value) == sentence
    assert names_in(folder) == {"step-1", "step-2"}


# faults ----------------------------------------------------------------------------------------------------------


def flip(path: Path, file: str, random: Random) -> str:
    data = bytearray((path / file).read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    (path / file).write_bytes(data)
    return file


def truncate(path: Path, file: str, random: Random) -> str:
    os.truncate(path / file, random.randrange((path / file).stat().st_size))
    return file


def empty(path: Path, file: str, random: Random) -> str:
    os.truncate(path / file, 0)
    return file


def lengthen(path: Path, file: str, random: Random) -> str:
    with (path / file).open("ab") as opened:
        opened.write(random.choice([b"\0", b" ", b"\n", b"x" * 5000]))
    return file


def miss(path: Path, file: str, random: Random) -> str:
    (path / file).unlink()
    return file


def become_a_folder(path: Path, file: str, random: Random) -> str:
    (path / file).unlink()
    (path / file).mkdir()
    return file


def swap_with_the_older(path: Path, file: str, random: Random) -> str:
    shutil.copyfile(path.with_name("step-1") / file, path / file)
    return file


def swap_within(path: Path, file: str, random: Random) -> str:
    other = random.choice([name for name in FILES if name != file])
    kept = (path / file).read_bytes()
    (path / other).replace(path / file)
    (path / other).write_bytes(kept)
    return f"{file}|{other}"


def add(path: Path, file: str, random: Random) -> str:
    name = random.choice([".hidden", "model.bin", "model.pt", f"{file}.tmp", "z"])
    (path / name).write_bytes((path / file).read_bytes())
    return name


def edit(path: Path, file: str, random: Random) -> str:
    other = Stamp(3, "0" * 64)
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m.update(step=1),
        lambda m: m.update(step=2.0),
        lambda m: m.update(step=True),
        lambda m: m.update(format=2),
        lambda m: m.update(format=None),
        lambda m: m.update(run_id="b-run"),
        lambda m: m.update(run_id=None),
        lambda m: m.update(bigbatch="9"),
        lambda m: m.update(written_at="2020-01-01T00:00:00+00:00"),
        lambda m: m.update(written_at="soon"),
        lambda m: m.update(digest="0" * 64),
        lambda m: m.update(digest=m["digest"].upper()),
        lambda m: m.update(extra=1),
        lambda m: m.update(files=[]),
        lambda m: m["files"].pop("model.safetensors"),
        lambda m: m["files"].update({"../x.json": {"bytes": 3, "sha256": other.sha256}}),
        lambda m: m["files"]["model.safetensors"].update(bytes=-1),
        lambda m: m["files"]["model.safetensors"].update(bytes=10**30),
        lambda m: m["files"]["model.safetensors"].update(sha256=other.sha256),
        lambda m: m.pop(random.choice(sorted(m))),
    ]
    edit_manifest(path, random.choice(edits))
    return "manifest.json"


def forge(path: Path, file: str, random: Random) -> str:
    """A manifest whose digest is right, of files that are not there like this."""
    manifest = manifests.parse((path / "manifest.json").read_bytes())
    name = random.choice(FILES[:-1])
    stamps = dict(manifest.files) | {name: Stamp(manifest.files[name].num_bytes + random.choice([0, 8]), "0" * 64)}
    forged = manifests.Manifest(manifest.version, manifest.step, RUN_ID, manifest.written_at, stamps)
    (path / "manifest.json").write_bytes(forged.to_bytes())
    return name


def garble(path: Path, file: str, random: Random) -> str:
    garbage = [b"", b"\0" * 100, b"[" * 10_000, b"null", b"[]", b"{}", b'{"format": 1}', b"9" * 9999, b"\xff\xfe{}"]
    (path / "manifest.json").write_bytes(random.choice(garbage))
    return "manifest.json"


FAULTS = [flip, flip, truncate, empty, lengthen, miss, become_a_folder, swap_with_the_older, swap_within, add, edit]
FAULTS += [edit, forge, garble]


def test_every_fault_is_named_and_last_good_chosen(two: Path, tmp_path: Path) -> None:
    done: set[tuple[str, str]] = set()
    for seed in range(280):
        random = Random(seed)
        fault, file = FAULTS[seed % len(FAULTS)], FILES[seed // len(FAULTS) % len(FILES)]
        folder = shutil.copytree(two, tmp_path / str(seed))
        path = folder / "step-2"
        named = fault(path, file, random).split("|")
        reason = verify(path)
        assert reason is not None, (seed, fault.__name__, file)
        assert reason.startswith(tuple(named)), (seed, fault.__name__, reason)
        assert newest(folder) == (folder / "step-1", [(path, reason)])
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(caught.value) == f"checkpoint {path} cannot be used: {reason}."
        done.add((fault.__name__, file))
        shutil.rmtree(folder)
    assert len(done) == len(set(FAULTS)) * len(FILES)


def test_every_bit_of_manifest_is_checked(folder: Path) -> None:
    file = folder / "step-2" / "manifest.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert (verify(folder / "step-2") or "").startswith("manifest.json "), place


def test_reasons_are_helpful_clauses(folder: Path) -> None:
    path, model = folder / "step-2", folder / "step-2" / "model.safetensors"
    size = model.stat().st_size
    os.truncate(model, 24)
    assert verify(path) == f"model.safetensors has 24 bytes, and the manifest says {size:,}"
    os.truncate(model, size)
    assert verify(path) == "model.safetensors differs from what was written (SHA-256)"
    model.unlink()
    assert verify(path) == "model.safetensors is missing"
    model.touch()
    (path / "notes").touch()
    assert verify(path) == "notes does not belong to it"
    (folder / "step-1").rename(folder / "step-40")
    assert verify(folder / "step-40") == "manifest.json is of step 1, and the folder is called step-40"
    assert verify(folder / "step-1") == f"there is no folder {folder / 'step-1'}"
    edit_manifest(path, lambda m: m.update(format=2))
    assert verify(path) == "manifest.json has format 2, and this bigbatch reads format 1"


def test_pipe_at_file_path_does_not_block(folder: Path) -> None:
    for name in ("model.safetensors", "manifest.json"):
        (folder / "step-2" / name).unlink()
        os.mkfifo(folder / "step-2" / name)
        assert verify(folder / "step-2") == f"{name} cannot be read: it is not a regular file"


def test_file_changed_during_verification_is_detected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigbatch.lm.checkpoint import reader

    def lengthen_after(descriptor: int) -> os.stat_result:
        found = os.fstat(descriptor)
        with (folder / "step-2" / "model.safetensors").open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(reader, "fstat", lengthen_after)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has .* bytes, and the manifest says"):
        read(folder / "step-2")


def test_verification_memory_does_not_grow_with_files(tmp_path: Path) -> None:
    path = write(tmp_path, 1, run_id=RUN_ID, tensors={"model": {"x": torch.zeros(2**23)}}, values={})
    tracemalloc.start()
    try:
        assert verify(path) is None
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


# nothing runs ----------------------------------------------------------------------------------------------------


class Payload:
    """What a thief would put in: unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_pickle_at_file_path_never_runs(file: str, known: bool, kind: str, folder: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", folder / "step-2"
    data = pickle.dumps(Payload(marker))
    if kind == "torch":
        torch.save(Payload(marker), path / file)
        data = (path / file).read_bytes()
    (path / file).write_bytes(data)
    if known and file != "manifest.json":  # a manifest that vouches for it
        manifest = manifests.parse((path / "manifest.json").read_bytes())
        stamps = dict(manifest.files) | {file: Stamp(len(data), sha256(data).hexdigest())}
        forged = manifests.Manifest(manifest.version, manifest.step, RUN_ID, manifest.written_at, stamps)
        (path / "manifest.json").write_bytes(forged.to_bytes())
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert f"step-2 cannot be used: {file} " in str(caught.value)
    assert not marker.exists()


def test_reading_unpickles_nothing(folder: Path) -> None:
    code = """
import pickle, sys
from pathlib import Path
import torch, safetensors.torch
from bigbatch.lm.checkpoint import newest, read
found = []
sys.addaudithook(lambda event, _: found.append(event) if event == "pickle.find_class" else None)
read(newest(Path(sys.argv[1]))[0])
print(len(found))
pickle.loads(pickle.dumps(Path))
print(len(found))
"""
    done = completed(script, code, str(folder), folder=folder)
    assert done.stdout.split() == ["0", "1"], done.stderr


# many ------------------------------------------------------------------------------------------------------------


def test_newest_is_by_number_and_ignores_foreign_names(folder: Path) -> None:
    for name in ("step-10.partial", "step-11.deleted", "step-012", "step-x", "best", "step-", "step-٣"):
        shutil.copytree(folder / "step-2", folder / name)
    save(folder, 10)
    (folder / "step-12").mkdir()
    assert newest(folder) == (folder / "step-10", [(folder / "step-12", "manifest.json is missing")])
    assert newest(folder / "nowhere") == (None, [])
    (folder / "file").touch()
    with pytest.raises(CheckpointError, match=r"the checkpoints in .*file cannot be listed: not a directory\.$"):
        newest(folder / "file")


def test_list_has_size_time_and_verdict(folder: Path) -> None:
    os.truncate(folder / "step-1" / "state.json", 0)
    broken, whole = list_all(folder)
    assert (broken.step, whole.step) == (1, 2)
    assert (broken.reason or "").startswith("state.json has 0 bytes")
    assert whole.reason is None
    assert whole.num_bytes == sum(file.stat().st_size for file in (folder / "step-2").iterdir())
    assert whole.written_at is not None
    assert whole.written_at.tzinfo is not None
    (folder / "step-1" / "manifest.json").unlink()
    assert list_all(folder)[0].written_at is None


def filled(folder: Path, steps: int, *broken: int) -> Path:
    for step in range(1, steps + 1):
        save(folder, step)
    for step in broken:
        (folder / f"step-{step}" / "state.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("broken", "keep", "left"),
    [
        ((), 1, {5}),
        ((), 2, {4, 5}),
        ((), 9, {1, 2, 3, 4, 5}),
        ((4,), 2, {3, 4, 5}),  # a broken one does not count
        ((3,), 2, {4, 5}),  # and goes with those that are old
        ((5,), 1, {4, 5}),  # nor does the newest
        ((1, 2, 3, 4), 2, {1, 2, 3, 4, 5}),
        ((1, 2, 3, 4, 5), 1, {1, 2, 3, 4, 5}),
    ],
)
def test_pruning_keeps_newest_intact_checkpoints(
    broken: tuple[int, ...], keep: int, left: set[int], tmp_path: Path
) -> None:
    folder = filled(tmp_path, 5, *broken)
    (folder / "step-7.deleted").mkdir()
    (folder / "mine").mkdir()
    removed = prune(folder, keep=keep, run_id=RUN_ID)
    assert removed == [folder / f"step-{step}" for step in range(1, 6) if step not in left]
    assert names_in(folder) == {f"step-{step}" for step in left} | {"mine"}


@pytest.mark.parametrize(("best", "keep", "left"), [(2, 1, {2, 5}), (5, 2, {4, 5}), (2, 2, {2, 4, 5}), (9, 1, {5})])
def test_pruning_keeps_the_best_however_old(best: int, keep: int, left: set[int], tmp_path: Path) -> None:
    folder = filled(tmp_path, 5)
    removed = prune(folder, keep=keep, best=best, run_id=RUN_ID)
    assert removed == [folder / f"step-{step}" for step in range(1, 6) if step not in left]
    assert names_in(folder) == {f"step-{step}" for step in left}


def test_pruning_removes_only_what_the_run_wrote(tmp_path: Path) -> None:
    folder = filled(tmp_path / "checkpoints", 7)
    save(folder, 0, run_id="other")
    (folder / "step-1" / "notes.txt").touch()
    shutil.rmtree(folder / "step-2")
    (folder / "step-2").symlink_to(shutil.copytree(folder / "step-3", tmp_path / "step-2"))
    (folder / "step-3" / "manifest.json").unlink()
    (folder / "step-4" / "state.json").unlink()
    (folder / "step-4" / "state.json").symlink_to(tmp_path / "step-2" / "state.json")
    os.truncate(folder / "step-7" / "order.json", 1)
    outside = names_in(tmp_path / "step-2")
    notes: list[str] = []
    assert prune(folder, keep=1, run_id=RUN_ID, on_note=notes.append) == [folder / "step-4", folder / "step-5"]
    assert names_in(folder) == {"step-0", "step-1", "step-2", "step-3", "step-6", "step-7"}
    assert names_in(tmp_path / "step-2") == outside
    reason = verify(folder / "step-7")
    assert notes == [
        f"checkpoint {folder / 'step-7'} is not valid and does not count as one to keep: {reason}",
        *(f"{folder / name} was not written by this run and is not removed" for name in ("step-0", "step-1")),
        *(f"{folder / name} was not written by this run and is not removed" for name in ("step-2", "step-3")),
    ]


def test_checkpoint_of_newer_format_is_not_skipped(folder: Path) -> None:
    path = folder / "step-2"
    content = json.loads((path / "manifest.json").read_bytes()) | {"format": 2}
    del content["digest"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    signed = content | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(signed), encoding="utf-8")
    reason = "manifest.json has format 2, and this bigbatch reads format 1"
    with pytest.raises(NewerCheckpointError, match=rf"^step-2: {reason}$"):
        newest(folder)
    before = (path / "manifest.json").read_bytes()
    assert prune(folder, keep=1, run_id=RUN_ID) == []
    save(folder, 2)
    assert (folder / "step-2.kept" / "manifest.json").read_bytes() == before
    content["format"] = 3  # a digest of something else: damaged
    (folder / "step-2" / "manifest.json").write_text(json.dumps(content | {"digest": "0"}), encoding="utf-8")
    assert newest(folder)[0] == folder / "step-1"


def test_pruning_to_zero_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 would leave no checkpoint: pass 1 or more"):
        prune(tmp_path, keep=0, run_id=RUN_ID)
    assert prune(tmp_path, keep=1, run_id=RUN_ID) == []
    assert prune(tmp_path / "nowhere", keep=1, run_id=RUN_ID) == []


def test_error_belongs_to_package() -> None:
    assert bigbatch.CheckpointError is CheckpointError
    assert issubclass(CheckpointError, bigbatch.BigbatchError)


def test_verifying_and_listing_load_no_torch(folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from bigbatch.lm.checkpoint import list_all, newest, prune
folder = Path(sys.argv[1])
list_all(folder), newest(folder), prune(folder, keep=1, run_id="a-run")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert names_in(folder) == {"step-2"}
    assert_same(read(folder / "step-2").tensors, tensors_of(2))
