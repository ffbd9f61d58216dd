"""Other threads and other processes beside a step: each case says what is wrong, or nothing."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .scenes import Scene, Snapshot, index, same

STEPS = 12


def run(scene: Scene, steps: int = STEPS) -> Snapshot:
    for seed in range(steps):
        scene.mode.way(scene.optimizer, scene.model, seed)
        scene.model.zero_grad()
    return Snapshot(scene.model, scene.optimizer)


def difference(one: Snapshot, other: Snapshot) -> str:
    wrong = [name for name in one.params if not same(one.params[name], other.params[name])]
    return f"other bits: {wrong}" if wrong or one.counters != other.counters else ""


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `call` in a thread. What is returned waits for it, and returns or raises what it did."""
    result: list[Any] = []

    def body() -> None:
        try:
            result.append(call())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(120)
        if not result:
            raise TimeoutError("the thread has not ended in two minutes")
        if isinstance(result[0], BaseException):
            raise result[0]
        return result[0]

    return wait


def two_models(name: str) -> str:
    """Two optimizers, each in its thread, at once."""
    expected = run(Scene(name))
    waits = [in_thread(lambda scene=scene: run(scene)) for scene in (Scene(name), Scene(name))]
    return "".join(difference(wait(), expected) for wait in waits)


def plain_backward(name: str) -> str:
    """Plain backwards of another model, with SGD, in another thread."""
    expected, scene = run(Scene(name)), Scene(name)

    def train() -> nn.Module:
        torch.manual_seed(1)
        model = nn.Linear(64, 64)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5 * STEPS):
            sgd.zero_grad()
            model(torch.ones(2, 64)).square().mean().backward()
            sgd.step()
        return model

    alone = train()
    wait = in_thread(train)
    wrong = difference(run(scene), expected)
    beside = wait()
    return wrong or ("" if torch.equal(alone.weight, beside.weight) else "SGD has other bits")


def state_dict_beside(name: str) -> str:
    """`state_dict` and a deep copy in another thread, all the time: each is that of a whole step."""
    scene = Scene(name)
    after_each = [Snapshot(scene.model, scene.optimizer)]
    for seed in range(STEPS):
        scene.mode.way(scene.optimizer, scene.model, seed)
        after_each.append(Snapshot(scene.model, scene.optimizer))
    scene, done = Scene(name), threading.Event()

    def save() -> list[dict[str, Any]]:
        saved = []
        while not done.is_set():
            saved.append(scene.optimizer.state_dict())
            copy.deepcopy((scene.model, scene.optimizer))[1].remove()
            time.sleep(0.001)
        return saved

    wait = in_thread(save)
    wrong = difference(run(scene), after_each[-1])
    done.set()
    first = int(after_each[0].state["lomo"]["step"])
    for state in wait():
        whole = after_each[int(state["lomo"]["step"]) - first].state["state"]
        for index_, numbers in state["state"].items():
            ours = {key: value for key, value in numbers.items() if isinstance(value, Tensor)}
            if any(not torch.equal(value, whole[index_][key]) for key, value in ours.items()):
                wrong = wrong or "a state dict of no step"
    return wrong


def inside_a_step(name: str) -> str:
    """A hook copies, saves or changes the optimizer inside its step: refused, and the step is not disturbed."""
    calls: dict[str, Callable[[Scene], Any]] = {
        "deepcopy": lambda scene: copy.deepcopy((scene.model, scene.optimizer)),
        "pickle": lambda scene: pickle.dumps((scene.model, scene.optimizer)),
        "state_dict": lambda scene: scene.optimizer.state_dict(),
        "load_state_dict": lambda scene: scene.optimizer.load_state_dict(scene.before.state),
        "add_param_group": lambda scene: scene.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    }
    for said, call in calls.items():
        scene, refused = Scene(name), []

        def hook(_: Tensor, call: Any = call, scene: Scene = scene, refused: list[str] = refused) -> None:
            try:
                call(scene)
            except RuntimeError as error:
                refused.append(str(error))

        handle = scene.model.first.bias.register_post_accumulate_grad_hook(hook)
        scene.step()
        handle.remove()
        if not refused or any("inside a step" not in words for words in refused):
            return f"{said} was not refused: {refused}"
        if wrong := difference(Snapshot(scene.model, scene.optimizer), scene.after):
            return f"{said} disturbed the step: {wrong}"
        scene.optimizer.remove()
    return ""


def in_child(call: Callable[[], str], seconds: float = 60.0) -> str:
    """Calls `call` in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the pool of OpenMP is not forked
            os.write(write, call().encode() or b" ")
        except BaseException as error:
            os.write(write, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    said = os.read(read, 10_000).decode().strip()
    os.waitpid(child, 0)
    died = timer.finished.is_set()
    timer.cancel()
    os.close(read)
    return "the child hung" if died else said


def fork_after_use(name: str) -> str:
    """The child makes the same steps as its parent."""
    scene, expected = Scene(name), run(Scene(name))
    in_the_child = in_child(lambda: difference(run(scene), expected))
    return in_the_child or difference(run(scene), expected)


def fork_during_a_step(name: str) -> str:
    """The child is forked while another thread is amid a step, which does not exist in the child."""
    scene, expected = Scene(name), run(Scene(name))
    amid, go_on = threading.Event(), threading.Event()

    def hook(_: Tensor) -> None:
        amid.set()
        go_on.wait(60)

    handle = scene.model.first.bias.register_post_accumulate_grad_hook(hook)
    wait = in_thread(scene.step)
    amid.wait(60)

    def step() -> str:
        go_on.set()
        handle.remove()
        outcome = scene.optimizer.last_step_outcome
        scene.before.load(scene.model, scene.optimizer)
        wrong = difference(run(scene), expected)
        return wrong or ("" if outcome in ("partial", "unchanged") else f"outcome {outcome}")

    try:
        return in_child(step)
    finally:
        go_on.set()
        wait()
        handle.remove()


def workers(name: str) -> str:
    """Workers of a DataLoader, forked amid training, which bring the batches."""
    scene, expected = Scene(name), run(Scene(name))
    loader: Any = DataLoader([index(seed) for seed in range(STEPS)], batch_size=None, num_workers=2)
    for batch in loader:
        scene.optimizer.backward(scene.model(batch))
    return difference(Snapshot(scene.model, scene.optimizer), expected)


CASES = {
    case.__name__: case
    for case in (
        two_models,
        plain_backward,
        state_dict_beside,
        inside_a_step,
        fork_after_use,
        fork_during_a_step,
        workers,
    )
}
NAMES = ("hook", "fused, one pass", "split, fused adalomo", "some gradients kept", "stochastic")


def faults(names: tuple[str, ...] = NAMES) -> Iterator[tuple[str, str, str]]:
    for name in names:
        for said, case in CASES.items():
            yield f"{said}, {name}", "ended", case(name)
