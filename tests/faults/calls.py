"""Calls that change an optimizer, in place of the step of a scene."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn

from lomo_kernels import Lomo

from .scenes import LR, Scene, Snapshot, same


class Call(Scene):
    """A call that changes the optimizer wholly or not at all, in place of a step."""

    def check(self, *, between_lines: bool = False) -> str:
        before, now = self.before, Snapshot(self.model, self.optimizer)
        if any(not same(now.params[name], before.params[name]) for name in now.params):
            return "a weight or its state was changed"
        if now.counters != before.counters or self.others() != self.others_before:
            return "numbers, groups or hooks were changed"
        self.step()
        done = self.others()
        self.undo()
        return self._next_step(now) or (
            "" if done == self.others_after else "the same call, again, does something else"
        )

    def reset(self) -> None:
        super().reset()
        self.others_before = self.others()

    def _without_fault(self) -> Snapshot:
        after = super()._without_fault()
        self.reset()
        self.step()
        self.others_after = self.others()
        self.undo()
        return after

    def others(self) -> Any:
        groups = [{**group, "params": len(group["params"])} for group in self.optimizer.param_groups]
        hooks = [len(param._post_accumulate_grad_hooks or ()) for param in self.more]
        return groups, hooks, len(self.optimizer._training.managed_params), self.optimizer.state_dict()["lomo"]["seed"]

    def undo(self) -> None:
        self.before.load(self.model, self.optimizer)


class Loading(Call):
    """`load_state_dict` of the run a step later, with another learning rate and seed."""

    more: ClassVar[list[nn.Parameter]] = []

    def step(self) -> None:
        state = copy.deepcopy(self.twin_optimizer.state_dict())
        state["param_groups"][0]["lr"], state["lomo"]["seed"] = 0.5, 3
        self.optimizer.load_state_dict(state)


class Adding(Call):
    """`add_param_group` of another linear layer."""

    fresh = False

    def __init__(self, name: str) -> None:
        self.more = list(nn.Linear(30, 700).parameters())
        super().__init__(name)

    def step(self) -> None:
        self.optimizer.add_param_group({"params": [(str(i), param) for i, param in enumerate(self.more)], "lr": 0.5})

    def undo(self) -> None:
        self.optimizer.remove()
        self.model, self.optimizer = self.make()
        self.more = list(nn.Linear(30, 700).parameters())
        super().undo()

    def reset(self) -> None:
        self.undo()
        super().reset()


class Making(Scene):
    """`Lomo(model)`: after a fault the parameters are free, and another optimizer trains them."""

    def reset(self) -> None:
        self.optimizer.remove()
        super().reset()
        self.optimizer.remove()

    def step(self) -> None:
        self.optimizer = Lomo(self.model, **{"lr": LR} | self.mode.options)

    def check_close(self) -> str:
        return self.check()

    def check(self, *, between_lines: bool = False) -> str:
        self.step()
        hooks = {len(param._post_accumulate_grad_hooks or ()) for param in self.model.parameters()}
        self.before.load(self.model, self.optimizer)
        return self._next_step(self.before) or ("" if hooks == {1} else f"{hooks} hooks on parameters")


CALLS: dict[str, type[Scene]] = {"step": Scene, "load_state_dict": Loading, "add_param_group": Adding, "Lomo()": Making}
