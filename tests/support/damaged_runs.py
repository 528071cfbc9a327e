"""Run directories that are damaged or foreign, and what each command does with them.

    a run killed after update 3 of 4 → a damaged copy → checkpoints, report, advise, generate, resume → Outcome

Everything runs in this process, in one folder whose content is replaced for each case, so that the paths in config.json
hold. A command must end with a result or with one sentence and exit code 1 or 2; a resumed run must end with the
parameters of the undamaged one, bit-identical; nothing outside the run directory may change.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from bigbatch.cli import main
from bigbatch.lm.checkpoint import manifest as manifests
from bigbatch.lm.checkpoint.manifest import Stamp
from bigbatch.lm.checkpoint.saved_state import SEAL, sealed
from bigbatch.lm.runs.identity import digest_of
from support.language_models import records, save_model_folder, write_jsonl
from support.run_directories import CHOICE, PROOF

HANG_S = 60
SENTENCE = re.compile(r"bigbatch (resume|checkpoints|advise|report|generate): [^\n]+\.\n")
TENSORS = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
OF_CHECKPOINT = (*TENSORS, "state.json", "manifest.json")
OF_RUN = ("run-manifest.json", "config.json", "metrics.jsonl", "events.jsonl", "microbatch.json", "smaller.json",
          "verify.json", ".lock", "quarantine.jsonl", "report.html")  # fmt: skip
OF_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
JSON_FILES = ("run-manifest.json", "config.json", "microbatch.json", "verify.json", "checkpoints/step-2/state.json",
              "checkpoints/step-3/state.json", "checkpoints/step-3/manifest.json")  # fmt: skip
OTHER_VALUES: tuple[Any, ...] = (
    None, True, "text", "", [], {}, -1, 2**70, 1.5, float("nan"), float("inf"), [None], {"$tensor": "none"},
    {"$tuple": 1}, {"$pairs": [1]}, "\x1b[2J", 0, {"$tensor": {}},
)  # fmt: skip
CONTENTS = (
    b"", b"null", b"[]", b"{}", b"0", b'"text"', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"a": 1e999}',
    b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0" * 100, b'{"step": 1, "step": 2}', b"NaN", b'{"format": 1}',
)  # fmt: skip


class Hang(BaseException):
    """A command did not end in `HANG_S` seconds."""


@dataclass
class Outcome:
    """What happened to one damaged run.

    Attributes:
        damage: What was damaged, and how.
        commands: Exit code of each command.
        resumed: ``identical``, ``refused``, ``differs``, ``failed``.
        problems: Tracebacks, hangs, messages that are no sentence, and files outside the run that changed.
    """

    damage: str
    commands: dict[str, int] = field(default_factory=dict)
    resumed: str = ""
    problems: list[str] = field(default_factory=list)


class DamagedRuns:
    """Makes damaged runs in a folder, and runs the commands on each.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.run = self.home / "run"
        self.base = self.home / "base"
        self.outside = self.home / "outside"
        self._template = folder / "template"
        self._make()
        self.reference = self.parameters()
        shutil.rmtree(self.run / "checkpoints" / "step-4")
        self.home.rename(self._template)

    def _make(self) -> None:
        self.outside.mkdir(parents=True)
        for name in ("precious.txt", "precious.json", "linked"):
            (self.outside / name).write_text('{"step": 1}\n' * 9, encoding="utf-8")
        write_jsonl(self.home / "data.jsonl", records(24))
        save_model_folder(self.base, kind="gpt2", dropout=0.1)
        words = {
            "data": self.home / "data.jsonl", "model": self.base, "device": "cpu", "global-batch": 4, "microbatch": 2,
            "steps": 4, "lr": 0.01, "max-length": 24, "checkpoint-every": 1, "keep": 4, "validation-every": 4,
        }  # fmt: skip
        flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        for run, *more in ((self.run,), (self.outside / "other", "--seed", "1"), (self.outside / "twin",)):
            code, _, error = captured(["train", *flags, "--out", str(run), *map(str, more)])
            assert code == 0, error
        (self.run / "microbatch.json").write_text(json.dumps(CHOICE), encoding="utf-8")
        (self.run / "smaller.json").write_text('{"size": 1, "unit": "sequences"}', encoding="utf-8")
        (self.run / "verify.json").write_text(json.dumps(PROOF), encoding="utf-8")

    def parameters(self) -> str | None:
        """Return the SHA-256 of the parameters after the last update; None before it."""
        try:
            return hashlib.sha256((self.run / "checkpoints/step-4/model.safetensors").read_bytes()).hexdigest()
        except OSError:
            return None

    def fresh(self) -> None:
        """Replace the folder of the run by an undamaged copy."""
        if self.home.exists():
            shutil.rmtree(self.home)
        shutil.copytree(self._template, self.home)

    def try_damage(self, kind: str, random: Random) -> Outcome:
        """Damage a fresh run in some way, and run the commands on it."""
        self.fresh()
        outcome = Outcome(f"{kind}: {KINDS[kind](self, random)}")
        before = snapshot(self.home, self.run)
        generates = "model" in outcome.damage.split("checkpoints")[0] or random.random() < 0.05
        for command in ("checkpoints", "report", "advise", *(["generate"] if generates else []), "resume"):
            self._try_command(command, outcome)
        after = snapshot(self.home, self.run)
        outcome.problems += [f"{name} outside the run changed" for name in before if before[name] != after.get(name)]
        outcome.problems += [f"{name} outside the run is new" for name in after.keys() - before.keys()]
        return outcome

    def _try_command(self, command: str, outcome: Outcome) -> None:
        more = ["--max-new-tokens", "2", "def "] if command == "generate" else []
        try:
            code, _, error = captured([command, str(self.run), *more])
        except Hang:
            outcome.problems.append(f"{command} hangs")
            return
        except Exception:  # noqa: BLE001 - what is looked for
            outcome.problems.append(f"{command} raises {traceback.format_exc()}")
            return
        outcome.commands[command] = code
        if code not in (0, 1, 2):
            outcome.problems.append(f"{command} ends with {code}")
        quiet = command in ("checkpoints", "verify") and code == 1 and not error  # no checkpoint is whole
        if code and not quiet and not SENTENCE.fullmatch(error):
            outcome.problems.append(f"{command} says {error!r}")
        if command == "resume":
            same = self.parameters() == self.reference
            outcome.resumed = (
                ("identical" if same else "differs") if code == 0 else "refused" if code == 2 else "failed"
            )


def captured(words: list[str]) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, output and errors.

    Raises:
        Hang: It does not end.
    """

    def stop(*_: object) -> None:
        raise Hang

    out, error = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), error.getvalue()


def snapshot(home: Path, run: Path) -> dict[str, object]:
    """Return what is below a folder, without a run directory: content, link target or kind of each path."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(home):
        if Path(folder) == run:
            folders.clear()
            continue
        for name in (*folders, *files):
            path = Path(folder) / name
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            content = path.read_bytes() if stat.S_ISREG(kind) else path.readlink() if stat.S_ISLNK(kind) else None
            found[str(path.relative_to(home))] = (kind, content)
    return found


# signatures ----------------------------------------------------------------------------------------------------------


def sign(checkpoint: Path, *, run_id: str | None = None, step: int | None = None, seal: bool = False) -> None:
    """Make the manifest of a checkpoint match its files; with ``seal``, state.json too."""
    old = manifests.parse((checkpoint / "manifest.json").read_bytes())
    names = [name for name in old.files if (checkpoint / name).is_file()]
    if seal:
        values = json.loads((checkpoint / "state.json").read_bytes())
        values.pop(SEAL, None)
        stamps = {name: stamp_of(checkpoint / name) for name in names if not name.endswith(".json")}
        (checkpoint / "state.json").write_text(json.dumps(sealed(values, stamps)), encoding="utf-8")
    stamps = {name: stamp_of(checkpoint / name) for name in names}
    new = replace(old, files=stamps, run_id=run_id or old.run_id, step=old.step if step is None else step)
    (checkpoint / "manifest.json").write_bytes(new.to_bytes())


def stamp_of(path: Path) -> Stamp:
    data = path.read_bytes()
    return Stamp(len(data), hashlib.sha256(data).hexdigest())


def to_legacy(run: Path) -> None:
    """Make a run directory one of layout 1: no run-manifest.json, a hash as run id, no seal and no fingerprint."""
    (run / "run-manifest.json").unlink()
    run_id = hashlib.sha256((run / "config.json").read_bytes()).hexdigest()[:16]
    for checkpoint in (run / "checkpoints").iterdir():
        values = json.loads((checkpoint / "state.json").read_bytes())
        del values[SEAL]
        for name in ("fingerprint", "learning", "model"):
            del values["facts"][name]
        (checkpoint / "state.json").write_text(json.dumps(values), encoding="utf-8")
        sign(checkpoint, run_id=run_id)


# kinds of damage -----------------------------------------------------------------------------------------------------

Damage = Callable[[DamagedRuns, Random], str]


def any_file(made: DamagedRuns, random: Random) -> Path:
    """Choose a file of the run: half of the time one of a checkpoint."""
    names = random.choice(
        [
            [f"checkpoints/step-{step}/{name}" for step in (1, 2, 3, 3, 3) for name in OF_CHECKPOINT],
            OF_RUN,
            [f"model/{name}" for name in OF_MODEL],
        ]
    )
    path = made.run / random.choice(list(names))
    if not path.exists():
        path.write_bytes(b"")
    return path


def name_of(made: DamagedRuns, path: Path) -> str:
    return str(path.relative_to(made.home))


def delete(made: DamagedRuns, random: Random) -> str:
    path = any_file(made, random)
    path.unlink()
    return name_of(made, path)


def truncate(made: DamagedRuns, random: Random) -> str:
    path = any_file(made, random)
    size = random.randrange(max(1, path.stat().st_size))
    os.truncate(path, size)
    return f"{name_of(made, path)} to {size}"


def flip(made: DamagedRuns, random: Random) -> str:
    path = any_file(made, random)
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(random.choice([1, 1, 30])):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return name_of(made, path)


def replace_file(made: DamagedRuns, random: Random) -> str:
    path = any_file(made, random)
    path.unlink()
    kind = put_other_kind(made, path, random)
    return f"{name_of(made, path)} by {kind}"


def put_other_kind(made: DamagedRuns, path: Path, random: Random) -> str:
    kind = random.choice(["folder", "pipe", "link", "dangling link", "link to a device", "device", "socket", "itself"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(made.outside / random.choice(["precious.txt", "precious.json"]))
    elif kind == "dangling link":
        path.symlink_to(made.outside / "new")
    elif kind == "itself":
        path.symlink_to(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(path.name)
        finally:
            os.chdir(here)
    else:
        try:
            if kind != "device":
                raise PermissionError
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # zeros without end
        except PermissionError:
            path.symlink_to("/dev/zero")
    return kind


def replace_folder(made: DamagedRuns, random: Random) -> str:
    name = random.choice(["checkpoints", "checkpoints/step-3", "checkpoints/step-1", "model"])
    path = made.run / name
    kind = random.choice(["link to itself elsewhere", "link to another run's", "other"])
    if kind == "link to itself elsewhere":
        path.rename(made.outside / "moved")
        path.symlink_to(made.outside / "moved")
    else:
        shutil.rmtree(path)
        if kind == "link to another run's":
            path.symlink_to(made.outside / "other" / name)
        else:
            kind = put_other_kind(made, path, random)
    return f"{name} by {kind}"


def add_link(made: DamagedRuns, random: Random) -> str:
    name = random.choice(
        ["model.partial", "model.older", "tensorboard", "checkpoints/step-4", "checkpoints/step-4.partial",
         "checkpoints/step-9", "checkpoints/step-1.deleted", "quarantine.jsonl", "report.html",
         f"report.html.{os.getpid()}.partial", f"microbatch.json.{os.getpid()}.partial"]
    )  # fmt: skip
    target = made.outside / random.choice(["linked", "other", "twin/checkpoints/step-4", "new"])
    (made.run / name).unlink(missing_ok=True)
    (made.run / name).symlink_to(target)
    return f"{name} to {target.name}"


def hard_link(made: DamagedRuns, random: Random) -> str:
    name = random.choice(["metrics.jsonl", "events.jsonl", ".lock", "quarantine.jsonl", "config.json"])
    path = made.run / name
    path.touch()
    os.link(path, made.outside / "hard")
    return name


def add_notes(made: DamagedRuns, random: Random) -> str:
    name = random.choice(["checkpoints/step-4", "checkpoints/step-0", "checkpoints/step-9", "checkpoints/step-2"])
    folder = made.run / name
    folder.mkdir(exist_ok=True)
    (folder / random.choice(["notes.txt", "notes.json"])).write_text("{}", encoding="utf-8")
    return name


def other_content(made: DamagedRuns, random: Random) -> str:
    path = any_file(made, random)
    content = random.choice(CONTENTS)
    path.write_bytes(content)
    signed = try_to_sign(path, random)
    return f"{name_of(made, path)} is {content[:20]!r}{signed}"


def huge(made: DamagedRuns, random: Random) -> str:
    path = any_file(made, random)
    os.truncate(path, 2**42 if random.random() < 0.5 and path.suffix != ".safetensors" else 2**26)
    return name_of(made, path)


def try_to_sign(path: Path, random: Random) -> str:
    """Sign the checkpoint of a file half of the time, if it can be signed."""
    if path.name == "manifest.json" or not path.parent.name.startswith("step-") or random.random() < 0.5:
        return ""
    sign(path.parent)
    return ", signed"


def lines(made: DamagedRuns, random: Random) -> str:
    path = made.run / random.choice(["metrics.jsonl", "events.jsonl"])
    rows = path.read_bytes().splitlines()
    other = [content for content in CONTENTS if len(content) < 10**6]
    kind = random.choice(["fewer", "changed", "values", "longer", "half a line"])
    if kind == "fewer":
        rows = rows[: random.randrange(len(rows))]
    elif kind == "changed":
        rows[random.randrange(len(rows))] = random.choice(other)
    elif kind == "values":
        row = json.loads(rows[index := random.randrange(len(rows))])
        replace_value(row, random)
        rows[index] = json.dumps(row).encode()
    elif kind == "longer":
        rows += [b"x" * 10_000] * 20
    path.write_bytes(b"\n".join(rows) + (b"" if kind == "half a line" else b"\n"))
    if kind == "half a line":
        os.truncate(path, path.stat().st_size - 40)
    return f"{path.name} {kind}"


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a tree with each of its keys."""
    for key in values if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from places(values[key])


def replace_value(values: Any, random: Random) -> str:
    """Replace a value by one of another type, or delete it."""
    found = list(places(values))
    short = [(owner, key) for owner, key in found if isinstance(owner, dict)]
    owner, key = random.choice(short if short and random.random() < 0.8 else found)
    if random.random() < 0.25:
        del owner[key]
        return f"{key} deleted"
    new = random.choice([value for value in OTHER_VALUES if type(value) is not type(owner[key])])
    owner[key] = new
    return f"{key} = {new!r}"


def json_value(made: DamagedRuns, random: Random) -> str:
    path = made.run / random.choice(JSON_FILES)
    values = json.loads(path.read_bytes())
    what = replace_value(values, random)
    path.write_text(json.dumps(values), encoding="utf-8")
    return f"{name_of(made, path)} {what}"


def signed_state(made: DamagedRuns, random: Random) -> str:
    path = made.run / f"checkpoints/step-{random.choice([2, 3])}/state.json"
    values = json.loads(path.read_bytes())
    what = replace_value(values, random)
    path.write_text(json.dumps(values), encoding="utf-8")
    sign(path.parent)
    return f"{path.parent.name} {what}"


def without_cursor(made: DamagedRuns, random: Random) -> str:
    path = made.run / "checkpoints/step-3/state.json"
    values = json.loads(path.read_bytes())
    name = random.choice(["cursor", "skipped", "step", "metrics_bytes"])
    del values["progress"][name]
    path.write_text(json.dumps(values), encoding="utf-8")
    sign(path.parent, seal=random.random() < 0.5)
    return name


def sealed_state(made: DamagedRuns, random: Random) -> str:
    """Change the type of a value and forge all digests: nothing but the types is left to notice it."""
    path = made.run / "checkpoints/step-3/state.json"
    values = json.loads(path.read_bytes())
    values.pop(SEAL)
    what = replace_value(values, random)
    path.write_text(json.dumps(values), encoding="utf-8")
    sign(path.parent, seal=True)
    return what


def signed_tensors(made: DamagedRuns, random: Random) -> str:
    path = made.run / "checkpoints/step-3" / random.choice(TENSORS)
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    kind = random.choice(["value", "header", "offsets", "shape", "dtype", "length", "truncated", "removed"])
    if kind == "value":
        data[random.randrange(8 + size, len(data))] ^= 1 << random.randrange(8)
    elif kind == "header":
        data[8 + random.randrange(size)] ^= 1 << random.randrange(8)
    elif kind == "length":
        data[:8] = random.choice([0, 1, 2**40, 2**63]).to_bytes(8, "little")
    elif kind == "truncated":
        del data[random.randrange(len(data)) :]
    elif kind != "removed":
        header = json.loads(data[8 : 8 + size])
        entry = header[random.choice(list(header))]
        if kind == "offsets":
            entry["data_offsets"] = random.choice([[0, 2**40], [5, 1], [-1, 3], [], "x", [0.5, 1]])
        elif kind == "shape":
            entry["shape"] = random.choice([[2**62, 2**62], [-1], [0], "x", [1.5], [1] * 40])
        else:
            entry["dtype"] = random.choice(["F99", "BF16", 3, None, "I64"])
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data[: 8 + size] = len(text).to_bytes(8, "little") + text
    path.write_bytes(data)
    if kind == "removed":
        path.unlink()
    sign(path.parent)
    return f"{path.name} {kind}"


def foreign_checkpoint(made: DamagedRuns, random: Random) -> str:
    other, step = random.choice(["other", "twin"]), random.choice([2, 3, 4])
    source, target = made.outside / other / f"checkpoints/step-{step}", made.run / f"checkpoints/step-{step}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    renamed = random.random() < 0.3
    if renamed:
        target.rename(target.with_name("step-9"))
        sign(target.with_name("step-9"), step=9)
    return f"step-{step} of {other}{' as step-9' if renamed else ''}"


def foreign_file(made: DamagedRuns, random: Random) -> str:
    other = random.choice(["other", "twin"])
    name = random.choice([*TENSORS, "state.json"])
    target = made.run / "checkpoints/step-3" / name
    shutil.copyfile(made.outside / other / "checkpoints/step-3" / name, target)
    signed = try_to_sign(target, random)
    return f"{name} of {other}{signed}"


def foreign_config(made: DamagedRuns, random: Random) -> str:
    other, name = random.choice(["other", "twin"]), random.choice(["config.json", "run-manifest.json"])
    shutil.copyfile(made.outside / other / name, made.run / name)
    return f"{name} of {other}"


def edit_one(
    path: Path, random: Random, choices: Sequence[tuple[str, Any]], *, indents: Sequence[int | None] = (None,)
) -> str:
    """Set one value of a JSON file."""
    values = json.loads(path.read_bytes())
    name, value = random.choice(choices)
    values[name] = value
    path.write_text(json.dumps(values, indent=random.choice(indents)), encoding="utf-8")
    return f"{name} = {value}"


def drop_checkpoints(made: DamagedRuns, random: Random, *, share: float) -> str:
    """Remove all checkpoints of a share of the runs."""
    if random.random() >= share:
        return ""
    shutil.rmtree(made.run / "checkpoints")
    return ", no checkpoint"


def edited_config(made: DamagedRuns, random: Random) -> str:
    edit = edit_one(
        made.run / "config.json", random,
        [("lr", 0.02), ("seed", 5), ("global_batch", 8), ("schedule", "constant"), ("weight_decay", 0.5), ("steps", 6),
         ("max_grad_norm", 0.1), ("max_length", 16), ("warmup_steps", 2), ("validation_fraction", 0.4),
         ("precision", "float64"), ("lora_rank", 2), ("scale_from", 1), ("data", "python-stdlib"), ("epochs", 2)],
    )  # fmt: skip
    return edit + drop_checkpoints(made, random, share=0.4)


def harmless_config(made: DamagedRuns, random: Random) -> str:
    return edit_one(
        made.run / "config.json", random,
        [("keep", 1), ("checkpoint_every", 2), ("sample_prompt", "x"), ("max_skipped", 3), ("grace_s", 1.0),
         ("validation_every", 2), ("async_checkpoint", True), ("timeout_s", 5.0)],
        indents=(None, 4),
    )  # fmt: skip


def earlier_layout(made: DamagedRuns, random: Random) -> str:
    """Make the run one of layout 1, whose state.json has no digest of its own, and change the type of a value."""
    to_legacy(made.run)
    return signed_state(made, random)


def newer_layout(made: DamagedRuns, random: Random) -> str:
    if random.random() < 0.5:
        path = made.run / "run-manifest.json"
        content = json.loads(path.read_bytes()) | {"layout": random.choice([3, 99])}
    else:
        path = made.run / "checkpoints/step-3/manifest.json"
        content = json.loads(path.read_bytes()) | {"format": random.choice([2, 7]), "new": True}
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": digest_of(content)}, indent=2), encoding="utf-8")
    return path.name


def edited_base(made: DamagedRuns, random: Random) -> str:
    edit = edit_one(
        made.base / "config.json", random,
        [("layer_norm_epsilon", 1e-2), ("activation_function", "relu"), ("resid_pdrop", 0.5), ("attn_pdrop", 0.0),
         ("n_head", 4), ("scale_attn_weights", False), ("n_layer", 1), ("model_type", "nothing"), ("n_embd", 32)],
    )  # fmt: skip
    return edit + drop_checkpoints(made, random, share=0.3)


def other_weights(made: DamagedRuns, random: Random) -> str:
    """Change the weights that a run without a checkpoint starts with, or its data."""
    shutil.rmtree(made.run / "checkpoints")
    if random.random() < 0.5:
        write_jsonl(made.home / "data.jsonl", records(25))
        return "data"
    path = made.base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-random.randrange(1, 400)] ^= 1 << random.randrange(7)
    path.write_bytes(data)
    return "base/model.safetensors"


KINDS: dict[str, Damage] = {
    "delete": delete, "truncate": truncate, "flip": flip, "replace file": replace_file,
    "replace folder": replace_folder, "add link": add_link, "hard link": hard_link, "add notes": add_notes,
    "other content": other_content, "huge file": huge, "lines": lines, "JSON value": json_value,
    "signed state": signed_state, "without a field": without_cursor, "sealed state": sealed_state,
    "signed tensors": signed_tensors, "foreign checkpoint": foreign_checkpoint, "foreign file": foreign_file,
    "foreign configuration": foreign_config, "edited config.json": edited_config, "harmless edit": harmless_config,
    "earlier layout": earlier_layout, "newer layout": newer_layout, "edited base model": edited_base,
    "other start": other_weights,
}  # fmt: skip
FORGED = ("sealed state", "earlier layout")  # only the types of values can be noticed
