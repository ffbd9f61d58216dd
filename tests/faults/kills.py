"""Kill -9 while a run is saved, at random moments: the last checkpoint loads, and the run goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from .scenes import Scene, Snapshot, same

STEPS = 400


def save_beside(folder: Path, step: int, state: dict[str, Any]) -> None:
    """To a file beside the checkpoint, which then takes its place."""
    with open(folder / "new.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # a kill needs no fsync; a power cut does
    os.replace(folder / "new.pt", folder / "checkpoint.pt")


def load_file(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return loaded


def save_dcp(folder: Path, step: int, state: dict[str, Any]) -> None:
    """To a folder of its own. It is complete when it has `.metadata`, which comes last."""
    dcp.save(state, checkpoint_id=folder / f"{step:06}", no_dist=True)


def load_dcp(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    complete = max(path.parent for path in folder.glob("*/.metadata"))
    dcp.load(state, checkpoint_id=complete, no_dist=True)
    return state


Way = tuple[Callable[[Path, int, dict[str, Any]], None], Callable[[Path, dict[str, Any]], dict[str, Any]]]
WAYS: dict[str, Way] = {"torch.save": (save_beside, load_file), "DCP": (save_dcp, load_dcp)}


def whole(scene: Scene) -> dict[str, Any]:
    return {"model": scene.model.state_dict(), "optimizer": scene.optimizer.state_dict()}


def step(scene: Scene) -> None:
    scene.mode.way(scene.optimizer, scene.model, int(scene.optimizer.step_count))


def faults(name: str, way: str, folder: Path, kills: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(point, outcome, what is wrong) for each of some kills."""
    save, load = WAYS[way]
    draw = random.Random(seed)
    warnings.filterwarnings("ignore", "torch.distributed is")
    for kill in range(kills):
        here = folder / f"{way}-{kill}"
        here.mkdir()
        delay = draw.uniform(0.0, 0.15)
        saved = _killed(name, save, here, delay)
        point = f"{way}, killed {1000 * delay:.0f} ms after save {saved[0]}, at save {saved[1]}"
        yield point, "killed", _resumes(name, load, here, saved[0])


def _killed(name: str, save: Any, folder: Path, delay: float) -> tuple[int, int]:
    """Saves after each step in a child, until it is killed `delay` seconds after its second save. Returns the last step
    that was saved, and the one whose save had begun."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            scene = Scene(name)
            for _ in range(STEPS):
                number = int(scene.optimizer.step_count)
                os.write(write, b"b%06d" % number)
                save(folder, number, whole(scene))
                os.write(write, b"e%06d" % number)
                step(scene)
        finally:
            os._exit(1)
    os.close(write)
    said = b""
    while said.count(b"e") < 2:
        said += os.read(read, 7)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 700):
        said += more
    os.close(read)
    notes = [said[i : i + 7] for i in range(0, len(said), 7)]
    begun, ended = ([int(note[1:]) for note in notes if note[:1] == kind] for kind in (b"b", b"e"))
    return ended[-1], begun[-1]


def _resumes(name: str, load: Any, folder: Path, saved: int) -> str:
    """What is wrong with the checkpoint: it has to be that of the last save or of the one after it."""
    scene, straight = Scene(name), Scene(name)
    state = load(folder, whole(scene))
    scene.model.load_state_dict(state["model"])
    scene.optimizer.load_state_dict(state["optimizer"])
    number = int(scene.optimizer.step_count)
    if number not in (saved, saved + 1):
        return f"the checkpoint is of step {number}, and {saved} was saved"
    while int(straight.optimizer.step_count) < number:
        step(straight)
    for _ in range(2):
        step(scene)
        step(straight)
    one, other = Snapshot(scene.model, scene.optimizer), Snapshot(straight.model, straight.optimizer)
    wrong = [key for key in one.params if not same(one.params[key], other.params[key])]
    return f"the resumed run differs: {wrong}" if wrong or one.counters != other.counters else ""


def torn(name: str, folder: Path, points: int) -> Iterator[tuple[str, str, str]]:
    """Checkpoints of which a part is missing: loading raises, and changes nothing."""
    scene = Scene(name)
    before = Snapshot(scene.model, scene.optimizer)
    save_beside(folder, 0, whole(scene))
    file = folder / "checkpoint.pt"
    data = file.read_bytes()
    for point in range(1, points):
        length = len(data) * point // points
        file.write_bytes(data[:length])
        yield f"{length} of {len(data)} bytes", *_refused(scene, before, lambda: load_file(folder, {}))
    save_dcp(folder, 0, whole(scene))
    (folder / "000000" / ".metadata").unlink()
    refused = _refused(scene, before, lambda: dcp.load(whole(scene), checkpoint_id=folder / "000000", no_dist=True))
    yield "DCP without .metadata", *refused


def _refused(scene: Scene, before: Snapshot, load: Callable[[], Any]) -> tuple[str, str]:
    try:
        state = load()
        scene.optimizer.load_state_dict(state["optimizer"])
        return "loaded", "a torn checkpoint was loaded"
    except (Exception, CheckpointException) as error:
        words = str(error)
    now = Snapshot(scene.model, scene.optimizer)
    changed = any(not same(now.params[name], before.params[name]) for name in now.params)
    return "refused", "something was changed" if changed else "" if words else "no words"
