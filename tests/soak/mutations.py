"""Damages checkpoints in thousands of ways, and hostile ones in others.

    KERAS_BACKEND=torch python -m tests.soak.mutations --damages 10000 \
        --forgeries 500

A *damage* is what disks and people do to files: it must be detected, the
checkpoint set aside, and the one before it used. A *forgery* has right hashes,
for whoever can write files can write hashes: a run that resumes from it may
refuse it or take it, and must do nothing else. The tests do the same with few.
"""

import argparse
import collections
import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

import legato
from legato import storage
from legato.checkpoint import CheckpointStore, load_checkpoint
from legato.errors import LegatoError, LegatoWarning
from legato.storage import strict_json

STEPS = 12
EVERY = 3
_LIMIT_SECS = 60
_MEMORY = 16 << 30


class Everything(keras.callbacks.Callback):
    """Holds one of each kind of thing that can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.recent: collections.deque[float] = collections.deque(maxlen=3)
        self.generator = np.random.default_rng(1)
        self.mean = np.zeros((2, 2))
        self.nested = {"a": [1, (2.5, None)], "b": {1, 2}, "c": b"x"}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count += 1
        self.recent.append(logs["loss"] + self.generator.uniform())
        self.mean += logs["loss"]
        self.nested["a"].append(self.count)


def train(run_dir: Path) -> keras.callbacks.History:
    """A run with a little of everything."""
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    x = np.linspace(-1, 1, 96, dtype="float32").reshape(32, 3)
    y = x.sum(axis=1, keepdims=True)
    return legato.fit(
        model,
        x,
        y,
        batch_size=8,
        epochs=STEPS // 4,
        verbose=0,
        validation_data=(x[:8], y[:8]),
        callbacks=[
            keras.callbacks.EarlyStopping(patience=9),
            keras.callbacks.ReduceLROnPlateau(patience=1),
            keras.callbacks.CSVLogger(run_dir / "log.csv"),
            Everything(),
        ],
        run_dir=run_dir,
        checkpoint_interval=EVERY,
        keep_last=None,
    )


# -- damages ------------------------------------------------------------------

Damage = Callable[[Path, Path, random.Random], None]
"""Damages a file; the second is the same one of another checkpoint."""


def _rewrite(change: Callable[[bytearray, random.Random], None]) -> Damage:
    def damage(file: Path, other: Path, rng: random.Random) -> None:
        del other
        content = bytearray(file.read_bytes())
        before = bytes(content)
        while bytes(content) == before:
            change(content, rng)
        file.write_bytes(content)

    return damage


def _flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _zero(content: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(content))
    end = min(len(content), begin + rng.randint(1, 4096))
    content[begin:end] = bytes(end - begin)


def _truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _append(content: bytearray, rng: random.Random) -> None:
    content += rng.randbytes(rng.randint(1, 100))


def _scramble(content: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(content))
    size = min(rng.randint(1, 64), len(content) - begin)
    content[begin : begin + size] = rng.randbytes(size)


class _Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch PWNED",)


_HOSTILE = [
    b"[" * 200_000,
    b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    b"1" * 100_000,
    b'{"a": 1e999, "a": NaN}',
    b'"\\ud800"',
    b"\xff\xfe\x00",
    b"",
    b'{"__class__": "os.system", "py/object": "os.system"}',
    pickle.dumps(_Bomb()),
]


def _hostile(content: bytearray, rng: random.Random) -> None:
    content[:] = rng.choice(_HOSTILE)


def _swap(file: Path, other: Path, rng: random.Random) -> None:
    del rng
    shutil.copyfile(other, file)


def _delete(file: Path, other: Path, rng: random.Random) -> None:
    del other, rng
    file.unlink()


def _link(file: Path, other: Path, rng: random.Random) -> None:
    """To a file with the right contents, outside of the run."""
    del other
    target = file.parents[3] / "outside" / f"{rng.getrandbits(64):x}"
    shutil.move(file, target)
    file.symlink_to(target)


def _pipe(file: Path, other: Path, rng: random.Random) -> None:
    del other, rng
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path, other: Path, rng: random.Random) -> None:
    del other, rng
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Damage] = {
    "a bit flipped": _rewrite(_flip),
    "zero-filled": _rewrite(_zero),
    "truncated": _rewrite(_truncate),
    "longer": _rewrite(_append),
    "scrambled": _rewrite(_scramble),
    "hostile JSON or a pickle": _rewrite(_hostile),
    "of another step": _swap,
    "deleted": _delete,
    "a symbolic link": _link,
    "a named pipe": _pipe,
    "a directory": _folder,
}


def damage_once(run: Path, work: Path, kind: str, rng: random.Random) -> str:
    """Damages the newest checkpoint of a copy; what was wrong, or ""."""
    copy = work / "run"
    shutil.rmtree(work, ignore_errors=True)
    (work / "outside").mkdir(parents=True)
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / f"step_{STEPS:08d}"
    before = copy / "checkpoints" / f"step_{STEPS - EVERY:08d}"
    expected = load_checkpoint(before)
    # (Small files as often as large ones.)
    files = sorted(p for p in newest.rglob("*") if p.is_file())
    file = rng.choice(files)
    other = before / file.relative_to(newest)
    if kind == "of another step" and file.read_bytes() == other.read_bytes():
        return ""
    DAMAGES[kind](file, other, rng)
    outside = _listing(work / "outside")
    with _limited(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            store = CheckpointStore(copy, run_id=expected.run_id)
            found = store.restore()
            store.close()
        except BaseException:
            return f"{kind}, {file.name}: {traceback.format_exc()}"
    told = [w for w in caught if issubclass(w.category, LegatoWarning)]
    if found is None or found.step != STEPS - EVERY:
        return f"{kind}, {file.name}: not detected"
    same = found.arrays.keys() == expected.arrays.keys() and all(
        found.arrays[name].tobytes() == array.tobytes()
        for name, array in expected.arrays.items()
    )
    # (As bytes: there are NaNs among the values.)
    hosts = [strict_json.dumps(each.host) for each in (found, expected)]
    if not same or hosts[0] != hosts[1]:
        return f"{kind}, {file.name}: the one before is another"
    if not any("set aside" in str(w.message) for w in told):
        return f"{kind}, {file.name}: nothing was said"
    if not list((copy / "checkpoints").glob("damaged-step_*")):
        return f"{kind}, {file.name}: nothing was set aside"
    if _listing(work / "outside") != outside or Path("PWNED").exists():
        return f"{kind}, {file.name}: something outside was changed"
    return ""


def _listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- forgeries ----------------------------------------------------------------

_VALUES: list[Any] = [
    None, True, 0, -1, 7, 2**40, 2**70, 0.5, -0.0, float("nan"),
    float("inf"), "", "x", "../../x", "os.system", "\x00", [], {}, [[]],
    [None] * 5, {"a": 1}, {"format": 1}, [["loss", "x"]], "é" * 3,
]  # fmt: skip


def forge_once(run: Path, work: Path, rng: random.Random) -> tuple[str, str]:
    """Resumes from a checkpoint with one value replaced, and right hashes.

    Returns:
        What was replaced, and what was wrong, or "".
    """
    copy = work / "run"
    shutil.rmtree(work, ignore_errors=True)
    (work / "outside").mkdir(parents=True)
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    newest = max((copy / "checkpoints").glob("step_*"))
    manifest, files = storage.read_directory(newest)
    contents = {name: bytes(data) for name, data in files.items()}
    about: Any = json.loads(json.dumps(manifest.about))
    if rng.random() < 0.15:
        what = _replace_somewhere(about, rng, "about")
    else:
        host = strict_json.loads(contents["host.json"])
        what = _replace_somewhere(host, rng, "host")
        with contextlib.suppress(ValueError, TypeError):
            contents["host.json"] = strict_json.dumps(host)
    shutil.rmtree(newest)
    try:
        storage.commit_directory(newest, contents, about)
    except (ValueError, TypeError):
        return what, ""  # it has no form in a file
    outside = _names(work)
    with _limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train(copy)
        except LegatoError:
            pass
        except BaseException:
            return what, traceback.format_exc()
    if _names(work) != outside or Path("PWNED").exists():
        return what, "something outside was changed"
    return what, ""


def _names(folder: Path) -> list[str]:
    """Of all that is beside the run."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "run"
    )


def _replace_somewhere(tree: Any, rng: random.Random, path: str) -> str:
    """Replaces, removes or adds one value of a tree of JSON."""
    places = list(_places(tree, path))
    holder, key, where = rng.choice(places)
    roll = rng.random()
    if roll < 0.1:
        del holder[key]
        return f"{where} removed"
    if roll < 0.15 and isinstance(holder, dict):
        holder["more"] = rng.choice(_VALUES)
        return f"{where} beside it: more"
    value = rng.choice(_VALUES)
    holder[key] = value
    return f"{where} = {value!r:.40}"


def _places(tree: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        where = f"{path}.{key}"
        yield tree, key, where
        yield from _places(value, where)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """What hangs is an error."""

    def stop(number: int, frame: Any) -> None:
        del number, frame
        raise TimeoutError(f"more than {_LIMIT_SECS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LIMIT_SECS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    """Prints a table, and each thing that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--forgeries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # (A header that claims terabytes must not get them.)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run = Path(folder, "original")
        train(run)
        work = Path(folder, "work")
        print(f"{'damage':26} number  undetected or failed")
        total = 0
        for k, kind in enumerate(DAMAGES):
            number = (arguments.damages + k) // len(DAMAGES)
            failed = []
            for i in range(number):
                rng = random.Random(f"{arguments.seed} {kind} {i}")
                failed.append(damage_once(run, work, kind, rng))
            failed = [each for each in failed if each]
            wrong += failed
            total += number
            print(f"{kind:26} {number:6}  {len(failed)}", flush=True)
        print(f"{'all':26} {total:6}  {len(wrong)}")
        failed = []
        for i in range(arguments.forgeries):
            rng = random.Random(f"{arguments.seed} forgery {i}")
            what, problem = forge_once(run, work, rng)
            if problem:
                failed.append(f"forgery {i}, {what}: {problem}")
        print(
            f"{'forged, with right hashes':26} {arguments.forgeries:6}  "
            f"{len(failed)}"
        )
        wrong += failed
        os.chdir("/")
    for each in wrong:
        print(each, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
