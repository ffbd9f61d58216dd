"""`Lomo`: SGD whose update happens inside backward (arXiv 2306.09782)."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..layers import Pair, fuse, layers_of, takers, unfuse
from ..ops.sgd import is_stochastic
from . import resume
from .graph import Graph, check_fused_weights, check_loss, run_backward
from .hyperparameters import check_group, check_positive, check_seed, numbers_of, unused_momentum
from .owners import OptimizerBackward, claim, forget, optimizer_backward, owner_of, release, unmanaged, unscale_grads
from .parameters import check_apart, check_parameter, is_served, name_of, named_groups
from .passes import KeepPass, NormPass, Pass, UpdatePass
from .ranks import Ranks, is_engine, is_here, local_of, ranks_of, shape_of
from .records import Record
from .repeat import CHECKPOINTS, TWO_PASSES, Shapes, can_compare, difference, differing, look_again, statistics_kept
from .scaling import LossScale, computes_in_float16, factor_of, is_of_grad_scaler
from .state import State
from .step import Step
from .step_hooks import as_step
from .summary import summary

_NOT_OURS = (
    ", by hand or by an engine that was given this optimizer (DeepSpeed's ZeRO: give it none, see "
    "docs/distributed.md). No weight was changed. Use add_param_group(), or make a new optimizer"
)
_NOTHING_CHANGED = "no weight was changed"
_INSIDE = "a step was started inside another step of the same optimizer; start it after that step"
_T = TypeVar("_T")
_ONE_KIND = "Use optimizer.backward() for all parts of a step, and optimizer.zero_grad() to drop one"


class Lomo(torch.optim.Optimizer):
    """Trains every parameter with plain SGD, each updated and its gradient freed while backward runs.

    ``optimizer.backward(loss)`` takes the place of ``loss.backward()``, ``optimizer.step()`` and
    ``optimizer.zero_grad()``. Only it (and `fused_backward`) frees gradients. A plain ``loss.backward()`` leaves them
    in ``.grad``, and `step` applies them: so any trainer can use it as a `torch.optim.Optimizer`. A parameter has one
    optimizer. A newer `Lomo` of some of the parameters takes them over, and the older one cannot be used any more.

    Per element, with g the gradient over the loss scale (`lomo_kernels.reference` states it bit for bit)::

        p = (1 - lr * weight_decay) * p - lr * min(1, clip_grad_norm / (norm + 1e-6)) * clamp(g)

    Args:
        model_or_params: an `nn.Module`, an iterable of parameters or of (name, parameter) pairs, or torch parameter
            groups, in which ``lr``, ``weight_decay`` and ``clip_grad_value`` may differ. float32, bfloat16 or float16;
            frozen ones of any dtype. Or the engine of DeepSpeed's ZeRO-3 (`lomo_kernels.integrations.deepspeed`).
        lr: learning rate, a number or a one-element tensor; read from ``param_groups`` at every step.
        clip_grad_norm: bound on the L2 norm over all parameters of the unscaled, unclamped gradient. Exact. The norm is
            known only after a backward pass: see `clip_passes`.
        clip_grad_value: bound on each element of the gradient, applied before the norm's coefficient.
        weight_decay: decoupled.
        clip_passes: for clipping by norm and dynamic loss scaling. "two": a backward for the norm, then one for the
            update; least memory. The first step of each new graph runs one more, to check that two backwards give the
            same gradients. "one": one backward, which keeps every gradient until the norm is known; of fused layers it
            keeps the factors if they are smaller (`docs/one_backward.md`). Fastest.
        loss_scale: None, a number, "dynamic", or "auto". "auto" is dynamic if a parameter is float16, or if the first
            backward computes in float16, as under autocast. Over several processes autocast only gives a warning.
        rounding: "nearest" or "stochastic", of bfloat16 and float16 parameters. Stochastic rounding is unbiased:
            updates far below a weight's last bit still count on average.
        nonfinite: "skip": a step whose gradient is not finite is counted in `skipped_steps`; with clipping or dynamic
            scaling it leaves all weights untouched, otherwise the elements concerned. "raise": it also raises
            FloatingPointError, which takes a host synchronisation per step.
        fused_layers: True: the weights of the model's `nn.Linear` and `nn.Embedding` get no gradient; their updates are
            formed from the gradient's factors, tile by tile. If you pass parameters or groups, pass the model here.
            `summary` says which weights are fused.
        process_group: False: none. A `torch.distributed.ProcessGroup`: data parallel without a wrapper. Gradients are
            averaged over the group inside backward, and parameters and buffers start as its first rank's. Not for
            DTensor parameters (FSDP2, tensor parallel): make the optimizer after ``fully_shard`` or
            ``parallelize_module``, without this argument. If you pass parameters or groups of DeepSpeed's engine, pass
            the engine here. See `docs/distributed.md`.
        seed: keys the stochastic rounding, with each parameter's place in ``param_groups`` and the step.

    Raises:
        TypeError, ValueError: an argument or a parameter is not as above, or is not the same on every rank.
        RuntimeError: the model is in DistributedDataParallel or FSDP1; another `Lomo` of a parameter runs a step now.
        NotImplementedError: a kind of parameter or buffer that is not implemented.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | Tensor | None = None,
        *,
        weight_decay: float | Tensor = 0.0,
        clip_passes: str = "two",
        loss_scale: float | str | None = "auto",
        rounding: str = "nearest",
        nonfinite: str = "skip",
        fused_layers: bool | nn.Module = False,
        process_group: Any = False,
        seed: int = 0,
    ) -> None:
        if clip_passes not in ("one", "two"):
            raise ValueError(f'Lomo: clip_passes is {clip_passes!r}, expected "two" or "one"')
        if is_engine(model_or_params):
            if process_group is not False:
                raise ValueError("Lomo: a DeepSpeed engine has its own process group; leave process_group out")
            engine: Any = model_or_params
            model_or_params, process_group = engine.module, engine
        model = _model_of(model_or_params, fused_layers)
        if clip_grad_norm is not None:
            check_positive("clip_grad_norm", clip_grad_norm)
        if nonfinite not in ("skip", "raise"):
            raise ValueError(f'Lomo: nonfinite is {nonfinite!r}, expected "skip" or "raise"')
        LossScale.check(loss_scale)
        self._clip_grad_norm = clip_grad_norm
        self._one_pass = clip_passes == "one"
        self._wanted_scale = loss_scale
        self._scale_is_open = loss_scale == "auto"  # until the first backward says whether it computes in float16
        self._stochastic = is_stochastic("Lomo", rounding)
        self._raise = nonfinite == "raise"
        self._seed = check_seed(seed, "Lomo: seed")

        self._process_group = process_group
        self._ranks: Ranks | None = None

        self._records: list[Record] = []
        self._claimed: list[int] = []  # ids of the parameters noted as ours
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._model = None if model is None else weakref.ref(model)  # in which layers are fused
        self._fused: list[weakref.ref[nn.Module]] = []
        self._takers: list[int] = []  # ids of their weights
        self._step: Step | None = None  # the one that runs now
        self._outcome: str | None = None  # of the last one
        self._kept_scale: Tensor | None = None  # the loss scale in the gradients that accumulate() left in .grad
        self._kept_dtype: torch.dtype | None = None  # of the losses they came from
        self._accumulating = False
        self._norm_is_known = False  # grad_norm() was called and fused_backward() not yet
        self._checkpoints: int | None = None  # reentrant ones in a graph in which no gradient came twice
        self._shapes = Shapes()  # of graphs through which two backwards gave the same
        self._ids: set[int] = set()  # of the parameters
        self._warned = False
        self._warned_of_momentum = False
        self._looked_for_scaler = False
        self._passed_over = False  # another optimizer's backward dropped a gradient of ours
        self._trained = False  # there was a step since step() was last called
        self._itself = weakref.ref(self)  # not so through a wrapper made of this class, as Lightning makes
        self._ended = ""  # why it cannot be used any more
        self._attached = False
        self._unpickled = False  # until the first step
        # Until the first step, which asks whether its parameters are still these.
        self._whole: Callable[[], nn.Module | None] | None = (
            weakref.ref(model_or_params) if isinstance(model_or_params, nn.Module) else lambda: None
        )
        self._trained_model: Callable[[], nn.Module | None] = self._whole if model is None else weakref.ref(model)
        self._stale = False  # `_place` was begun and not ended
        self._busy: Any = threading.RLock()  # held during a step
        self._stepping: set[int] = set()  # threads in which step hooks are called now
        defaults = {"lr": lr, "weight_decay": weight_decay, "clip_grad_value": clip_grad_value}
        defaults["momentum"] = 0.0  # is not used; OneCycleLR and CyclicLR want to set it
        super().__init__(named_groups(model_or_params), defaults)
        self._ranks = self._join_ranks(self._records, self.param_groups)
        self._state = State(self._records, self.param_groups, loss_scale, ranks=self._ranks)
        self._repeat_state()
        if model is not None and self._ids.isdisjoint(id(param) for param in model.parameters()):
            raise ValueError("Lomo: fused_layers is a module with none of the parameters given, expected their model")
        self._replace_owners(self._records)
        self._attach()
        self._attached = True
        # An optimizer that is dropped without remove() leaves no hooks behind.
        weakref.finalize(
            self, _let_go, id(self), self._claimed, self._records, self._handles, self._takers, self._fused
        ).atexit = False

    # ---- What a user calls ------------------------------------------------------------------------------------------

    @as_step(lambda self, *_, **__: not self._accumulating)
    def backward(self, loss: Tensor) -> None:
        """One step of training: runs backward, and applies and frees every gradient as soon as it exists.

        With `clip_grad_norm` or dynamic loss scaling, backward runs twice, first for the norm (see `clip_passes`).
        Gradients that plain backwards (or `accumulate`) left in ``.grad`` are part of the step: the new gradients are
        added to them, then all are applied and freed. Inside `accumulate` this call only adds to ``.grad``. Parameters
        of another `Lomo` get no gradient, and their ``.grad`` stays as it was. Leaves that no `Lomo` manages get the
        ``.grad`` of one plain backward.

        torch's step hooks are called before and after it, except inside `accumulate`: the optimizer's own
        (`register_step_pre_hook`, `register_step_post_hook`) and the global ones. Their args are ``(optimizer, loss)``.

        Args:
            loss: one floating-point element, not scaled.

        Raises:
            TypeError, ValueError, RuntimeError: `loss` is no such tensor or needs no gradient; a parameter's gradient
                is sparse or comes twice; two backwards give different gradients; a hyperparameter is not usable.
            FloatingPointError: the gradient is not finite and ``nonfinite="raise"``. Step post hooks are not called.
        """
        self._exclusively(lambda step: self._train(step, loss))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Inside, `backward` only adds its gradients to ``.grad``. The next `backward` outside applies the sum. Exact.

        If a `backward` inside breaks off (an interrupt, an error in a hook) after it has added to some gradients, all
        accumulated gradients are dropped, with a warning. Then begin the step again.
        """
        self._check_not_wrapped()
        before = self._accumulating
        try:
            try:
                self._accumulating = True
                yield
            finally:
                self._accumulating = before
        finally:
            self._accumulating = before  # again: an interrupt may have kept the line above from running

    @as_step(lambda self, closure=None: closure is not None or self._has_gradients())
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the gradients that plain backwards left in ``.grad``. They stay there. If there are none, as after
        `backward`, this does nothing and calls no step hooks.

        Args:
            closure: called first, with gradients enabled; its result is returned.
        """
        self._check_not_ended()
        self._check_not_inside(_INSIDE)
        trained, self._trained = self._trained, False
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        if self._step_supports_amp_scaling and hasattr(self, "found_inf"):
            del self.found_inf
            raise RuntimeError(
                "Lomo: torch's GradScaler decides on every rank alone whether to step, from gradients that are not "
                'summed over the ranks yet. Use optimizer.backward(loss) and loss_scale="dynamic" in its place. No '
                "weight was changed"
            )
        if self._has_gradients():
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "Lomo.step() applies gradients that a plain backward has kept in memory, all of them. "
                    "optimizer.backward(loss) in place of loss.backward() frees each gradient as soon as it exists",
                    stacklevel=3,  # `as_step` wraps step() once, twice where there are hooks
                )
            self._exclusively(self._apply_plain)
        elif self._unpickled and closure is None:
            raise RuntimeError(
                "Lomo: the parameters of this optimizer have got no gradient since it was unpickled. They are copies, "
                "not the model's; pickle model and optimizer together, as one tuple, and use both from it"
            )
        elif self._passed_over and not (trained or self._trained):
            self._passed_over = False
            warnings.warn(
                "Lomo.step() found no gradients. The backward of another Lomo ran through these parameters, and gives "
                "gradients only to its own. Use this optimizer's backward() too, or one Lomo with parameter groups",
                stacklevel=3,
            )
        self._trained = False
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch's GradScaler asks this before it hands `found_inf` and `grad_scale` to `step`, which refuses them."""
        return self._state.divides

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what plain backwards left in ``.grad``.

        Args:
            set_to_none: False: the tensors stay, filled with zeros, and the next backward adds to them. For torch's
                optimizers they are gradients: weight decay applies to their parameters. So the next `backward` has all
                gradients in memory; it frees them at its end.
        """
        itself = self._itself()
        if itself is not None and itself is not self:  # Lightning's wrapper is made of this class
            itself.zero_grad(set_to_none)
            return
        super().zero_grad(set_to_none=set_to_none)
        for record in self._records:
            record.note_zeros()
        self._drop_norm()

    def grad_norm(self, loss: Tensor) -> Tensor:
        """First call of lomo_optim's pair: a backward for the norm. The next `fused_backward` uses the norm, once.

        Returns:
            The norm, as `last_grad_norm`.
        """

        def find(step: Step) -> Tensor:
            self._drop_norm()
            self._check_loss(loss)
            self._refresh(loss)
            if self._kept():
                raise RuntimeError(
                    "Lomo: grad_norm() found gradients in .grad, expected none; use backward(), which includes them, "
                    "or zero_grad(), which drops them"
                )
            self._find_norm(step, Graph(loss), self._start_scale(loss))
            self._norm_is_known = True
            return self.last_grad_norm

        return self._exclusively(find)

    @as_step(lambda self, *_, **__: not self._accumulating)
    def fused_backward(self, loss: Tensor, lr: float | Tensor) -> None:
        """lomo_optim's name for `backward`, with the learning rate of all groups given for this step.

        After `grad_norm` it runs one backward, otherwise both: an old norm is never used.
        """

        def run(step: Step) -> None:
            check_group({"lr": lr, "weight_decay": 0.0, "clip_grad_value": None}, "Lomo.fused_backward")
            self._train(step, loss, lr, after_grad_norm=True)

        self._exclusively(run)

    def summary(self) -> str:
        """A table to print: what happens to each parameter's gradient, and why."""
        kept = self._one_pass and self._needs_norm_first
        return summary(self._records, None if self._model is None else self._model(), kept=kept)

    def remove(self) -> None:
        """Takes the hooks off and lets another optimizer have the parameters. The optimizer cannot be used again.

        Raises:
            RuntimeError: a hook called it inside a step. The gradients that come later would stay in ``.grad``.
        """
        self._check_not_inside("remove() was called inside a step of the same optimizer; call it after the step")
        self._end_use("remove() was called on this optimizer; make a new one")

    def __enter__(self) -> Lomo:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def grad_norms(self) -> dict[str, Tensor]:
        """Norm of each parameter's gradient in the last step: unscaled, before clipping of any kind.

        The host does not wait for the device. Over several ranks the norms are of whole parameters and averaged
        gradients. With sharded parameters (FSDP2, tensor parallel, DeepSpeed) this is one all-reduce: every rank has to
        call it.

        Returns:
            A dict by name, in the order of ``param_groups``. Norms are copies: float64, no dimensions, on the first
            parameter's device. A norm is zero if the parameter got no gradient; all are zero after a step that broke
            off. The fourth parameter is "parameter 3" if it was given without a name. If its name occurs twice, the
            second one gets "(parameter 3)" added.
        """
        norms: dict[str, Tensor] = {}
        for record, norm in zip(self._records, self._state.norms().unbind(), strict=True):
            name = record.name if record.name not in norms else f"{record.name} (parameter {record.index})"
            norms[name] = norm
        return norms

    @property
    def last_grad_norm(self) -> Tensor:
        """Global L2 norm of the last step's unscaled, unclamped gradient: float64, no dimensions, on the first
        parameter's device. Zero before the first step and after one that broke off. The next step overwrites it."""
        return self._state.norm

    @property
    def last_step_outcome(self) -> str | None:
        """What happened to the weights in the last call of `backward`, `fused_backward`, `grad_norm` or `step`, also if
        an exception or an interrupt ended it. None before the first call.

        - ``"complete"``: every gradient was applied (or skipped because it is not finite: see `skipped_steps`).
        - ``"unchanged"``: no weight was changed: `grad_norm`, `accumulate`, or a step that broke off early.
        - ``"partial"``: the step broke off, and some weights may have been updated. The others have their old values.

        After an exception the next step starts from the weights as they are. It uses nothing of the broken step, whose
        gradients and norm are dropped. Gradients that were in ``.grad`` before the broken step stay if the step has
        not added to them and has changed no weight. Otherwise they are dropped, with a warning.
        """
        return self._outcome

    @property
    def loss_scale(self) -> Tensor:
        """The present loss scale: float32, no dimensions, on the first parameter's device. 1 without scaling."""
        return self._state.scale.scale

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps whose gradient was not finite: int64, no dimensions, on the first parameter's device."""
        return self._state.skipped

    @property
    def step_count(self) -> Tensor:
        """Number of steps, skipped ones included: int64, no dimensions, on the first parameter's device."""
        return self._state.home.step

    # ---- Groups and state -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`. The new parameters' ids follow the present ones.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: as the constructor; nothing is added then.
        """
        self._check_not_wrapped()
        self._check_not_ended()
        if not isinstance(param_group, dict):
            raise TypeError(f"Lomo: a parameter group is a {type(param_group).__name__}, expected a dict")
        entries = param_group["params"]
        entries = [entries] if isinstance(entries, Tensor) else entries
        if not isinstance(entries, set):  # torch's own error says why not
            entries = list(entries)
        known = {id(record.param) for record in self._records}
        records = []
        for index, entry in enumerate(entries, start=len(self._records)):
            name, param = name_of(entry, index)
            check_parameter(name, param)
            if id(param) in known:
                raise ValueError(f"Lomo: {name} is given twice; each parameter has one place in one group")
            known.add(id(param))
            records.append(Record(param, index, name))
            records[-1].served = is_served(param)
        check_apart((record.name, record.param) for record in (*self._records, *records))
        group = {**self.defaults, **param_group, "params": entries}
        check_group(group, f"Lomo: param_groups[{len(self.param_groups)}]")
        if self._attached:
            self._all_or_nothing(functools.partial(self._add_later, group, records))
        else:
            self._add(group, records)

    def _add(self, group: dict[str, Any], records: Sequence[Record]) -> None:
        super().add_param_group(group)
        self._records.extend(records)
        self._ids = {id(record.param) for record in self._records}

    def _add_later(self, group: dict[str, Any], records: Sequence[Record]) -> None:
        ranks = self._join_ranks([*self._records, *records], [*self.param_groups, group])
        self._add(group, records)
        self._ranks = ranks
        self._place()
        self._replace_owners(records)
        self._attach()

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with ``"lomo"``: step, loss scale, growth tracker, skipped steps, seed and parameters.

        ``"state"`` repeats these numbers for each parameter, because `torch.distributed.checkpoint` keeps nothing else.
        All tensors are copies.
        """
        handle = self.register_state_dict_post_hook(_complete, prepend=True)  # before the user's, who see all of it
        try:
            state: dict[str, Any] = super().state_dict()
        finally:
            handle.remove()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was saved, bit for bit. All of it is loaded, or nothing.

        Parameters are compared by position and shape; the position keys a parameter's random bits. They are compared by
        name too if both sides have names; what `torch.compile` and ``checkpoint_wrapper`` add to names is ignored. So
        parameters without names that have equal shapes may be in another order: this is not noticed. The state dict of
        a `torch.optim.SGD` gives learning rates and weight decay. A warning names what is dropped.

        Raises:
            TypeError, ValueError: `state_dict` is not from `Lomo` or SGD, is of other parameters, of another kind of
                loss scaling or of a later version, or has a value that is not possible in a run. Nothing is loaded.
        """
        self._check_not_wrapped()
        self._all_or_nothing(functools.partial(self._load, state_dict))

    def _load(self, state_dict: dict[str, Any]) -> None:
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()  # as torch hands it to hooks
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        kind = self._state.scale.kind
        kinds = (kind, "dynamic") if self._scale_is_open else (kind,)
        read = resume.read(state_dict, self._records, self.param_groups, self.defaults, kinds)
        if read.numbers is None:
            warnings.warn(
                "Lomo: the state dict is from torch.optim.SGD. Loaded: learning rates, weight decay and what "
                f"schedulers keep in the groups. Dropped: {', '.join(read.dropped) or 'nothing that was in use'}",
                stacklevel=4,  # load_state_dict's caller
            )
            self._drop_norm()
        else:
            self._norm_is_known = False
            if read.numbers["scaling"] != kind:  # what the first backward of the run that is resumed has settled
                self._wanted_scale = read.numbers["scaling"]
                self._place()
            self._state.load(read.numbers)
            self._seed = read.numbers["seed"]
        self.param_groups = [
            loaded | {key: group[key] for key in ("params", "param_names") if key in group}
            for group, loaded in zip(self.param_groups, read.groups, strict=True)
        ]
        self._repeat_state()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _repeat_state(self) -> None:
        """Puts the optimizer's numbers into ``self.state``, where torch looks for a parameter's state.

        If the state were empty, `torch.distributed.checkpoint` would make gradients for all parameters and run a step.
        """
        for record in self._records:
            self.state[record.param] = self._state.by_parameter() | {"seed": self._seed}

    def _all_or_nothing(self, change: Callable[[], None]) -> None:
        """Calls `change`. If it raises, the optimizer, its parameters' hooks and its layers are as they were before."""
        attributes = vars(self).copy()
        records = [(record, vars(record).copy()) for record in self._records]
        groups, handles = len(self.param_groups), len(self._handles)
        sinks, layers, claimed = len(self._takers), len(self._fused), len(self._claimed)
        state, numbers = dict(self.state), self._state.export()
        try:
            change()
        except BaseException:
            self.__dict__ = attributes
            release(_cut(self._claimed, claimed))
            _detach(_cut(self._handles, handles), _cut(self._takers, sinks), _cut(self._fused, layers))
            _cut(self._records, len(records))
            _cut(self.param_groups, groups)
            for record, before in records:
                record.__dict__ = before
            self.state.clear()
            self.state.update(state)
            self._state.load(numbers)
            raise

    # ---- Copies -----------------------------------------------------------------------------------------------------

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "Lomo: copy.copy would make a second optimizer of the same parameters. Use the optimizer itself, or "
            "copy.deepcopy((model, optimizer))"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Lomo:
        """An equal optimizer of the parameters' copies. They have to be in `memo`: the model is copied first.

        Gradients, and hooks that were registered on the optimizer, are not copied, as with torch's optimizers.
        """

        def copied(original: Any, name: str) -> Any:
            if id(original) not in memo:
                raise TypeError(
                    f"Lomo: {name} was not copied before the optimizer, so the optimizer's copy would train nothing. "
                    "Copy both together, the model first: copy.deepcopy((model, optimizer))"
                )
            return memo[id(original)]

        groups, settings, numbers = self._parts(copied)
        new = type(self).__new__(type(self))
        memo[id(self)] = new

        def own(options: dict[str, Any]) -> dict[str, Any]:
            done = ("params", "fused_layers", "process_group")  # a process group is not copied
            return {key: value if key in done else copy.deepcopy(value, memo) for key, value in options.items()}

        new._become([own(group) for group in groups], own(settings), numbers)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the optimizer with its parameters. A model in the same pickle shares them."""
        if self._ranks is not None:
            raise TypeError("Lomo: an optimizer over several ranks cannot be pickled; save its state_dict()")
        return _unpickled, (type(self), *self._parts(lambda part, _: part))

    def _parts(self, of: Callable[[Any, str], Any]) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        """Groups, the constructor's other arguments, and numbers, for an equal optimizer of other parameters.

        Args:
            of: called with a parameter (or the model in which layers are fused) and its name; returns the other one.
        """
        self._check_not_ended()
        self._check_groups()
        if is_engine(self._process_group):
            raise TypeError("Lomo: an optimizer of a DeepSpeed engine cannot be copied; save its state_dict()")
        groups = []
        records = iter(self._records)
        for group in self.param_groups:
            params = [of(record.param, record.name) for record in itertools.islice(records, len(group["params"]))]
            entries = list(zip(group["param_names"], params, strict=True)) if "param_names" in group else params
            groups.append({key: value for key, value in group.items() if key != "param_names"} | {"params": entries})
        model = None if self._model is None else self._model()
        settings = {
            "lr": self.defaults["lr"],
            "weight_decay": self.defaults["weight_decay"],
            "clip_grad_value": self.defaults["clip_grad_value"],
            "clip_grad_norm": self._clip_grad_norm,
            "clip_passes": "one" if self._one_pass else "two",
            "loss_scale": self._wanted_scale,
            "rounding": "stochastic" if self._stochastic else "nearest",
            "nonfinite": "raise" if self._raise else "skip",
            "fused_layers": False if model is None else of(model, "the model"),
            "process_group": self._process_group,
            "seed": self._seed,
        }
        return groups, settings, self._state.export() | self._state.export_norms()

    def _become(self, groups: list[dict[str, Any]], settings: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Initialises a new object from `_parts`."""
        Lomo.__init__(self, groups, **settings)  # a subclass may take other arguments
        self._state.load(numbers)
        self._state.load_norms(numbers)

    # ---- One step ---------------------------------------------------------------------------------------------------

    @property
    def _needs_norm_first(self) -> bool:
        return self._clip_grad_norm is not None or self._state.scale.kind == "dynamic"

    def _train(
        self, step: Step, loss: Tensor, lr: float | Tensor | None = None, *, after_grad_norm: bool = False
    ) -> None:
        self._check_loss(loss)
        if not after_grad_norm:
            self._drop_norm()
        self._refresh(loss, lr)
        if self._whole is not None:
            self._check_still_there()
        known, self._norm_is_known = self._norm_is_known, False
        kept = self._kept()
        if self._accumulating or kept or self._unreduced():
            self._add_to_kept(step, loss, kept)
            del kept
            if not self._accumulating:
                self._apply_kept(step, keep=False)
            return
        scale = self._start_scale(loss)
        scaled = scale is not None
        graph = Graph(loss)
        if self._needs_norm_first and self._one_pass and not known:
            self._state.zero_slots()
            gradients = KeepPass(
                self._state.devices,
                self._params_of_fused(),
                scaled=scaled or self._state.divides,
                ranks=self._ranks,
            )
            self._sweep(step, gradients, graph, scale, retain_graph=False)
            gradients.check()
            self._state.decide(self._clip_grad_norm)
            self._raise_if_not_finite(step, scaled, _NOTHING_CHANGED)
            gradients.apply(self._update_pass(step, scaled))
            self._finish(step, scaled)
            return
        if self._needs_norm_first:
            if not known:
                self._find_norm(step, graph, scale)
            self._raise_if_not_finite(step, scaled, _NOTHING_CHANGED)
        else:
            if self._takers:
                check_fused_weights(loss)
            self._check_reentrancy(step, graph, scale)
            self._state.zero_slots()
        self._sweep(step, self._update_pass(step, scaled, self._ranks), graph, scale, retain_graph=False)
        self._finish(step, scaled)

    def _check_loss(self, loss: Tensor) -> None:
        """Raises TypeError, ValueError or RuntimeError unless `loss` is one number, and no GradScaler has scaled it."""
        check_loss(loss)
        factor = None if self._looked_for_scaler else factor_of(loss)
        if factor is None:
            return
        if is_of_grad_scaler(factor):
            raise RuntimeError(
                "Lomo: the loss was multiplied by the scale of a torch.amp.GradScaler. The update would be too large "
                'by this factor. Use Lomo(..., loss_scale="dynamic") and optimizer.backward(loss), without the scaler. '
                "No weight was changed"
            )
        self._looked_for_scaler = True  # once: some loops multiply by another tensor each time

    def _scale_float16(self, loss: Tensor) -> None:
        """The first backward decides what ``loss_scale="auto"`` means if no parameter is float16."""
        if not self._scale_is_open:
            return
        self._scale_is_open = False
        if self._state.scale.used or not computes_in_float16(loss):
            return
        if self._ranks is not None:  # which would have to agree on it
            warnings.warn(
                "Lomo: backward computes in float16 (autocast?) without a loss scale, so small gradients become zero. "
                'Over several processes, pass loss_scale="dynamic" (or None) to Lomo',
                stacklevel=9,
            )
            return
        self._wanted_scale = "dynamic"
        self._place()

    def _start_scale(self, loss: Tensor) -> Tensor | None:
        """The loss scale for a backward from `loss`; tells the kernels to divide by it. None: no scaling."""
        scale = self._state.scale.of(loss) if self._state.scale.used else None
        self._state.unscale_by(scale)
        return scale

    def _find_norm(self, step: Step, graph: Graph, scale: Tensor | None) -> None:
        self._look(step, graph, scale, self._ranks)
        self._state.decide(self._clip_grad_norm)
        if graph in self._shapes:
            return
        # An engine that reduces inside backward needs all ranks for this check. They all run it in the first step only.
        first = not len(self._shapes)
        if self._ranks is not None and self._ranks.same_graphs and not first:
            return
        # A step whose norm is not finite changes nothing, and its norms cannot be compared.
        if not can_compare(list(self._state.devices.values())) or self._state.home.found_inf.item():
            return
        self._check_repeats(step, graph, scale, self._ranks if first else None, TWO_PASSES)
        self._shapes.add(graph)

    def _look(self, step: Step, graph: Graph, scale: Tensor | None, ranks: Ranks | None) -> None:
        """A backward that sets the slots to zero, adds up norms in them, and keeps the graph for another backward."""
        self._state.zero_slots()
        scaled = scale is not None or self._state.divides
        norms = NormPass(self._state.devices, scaled=scaled, ranks=ranks)
        self._sweep(step, norms, graph, scale, retain_graph=True)

    def _check_repeats(self, step: Step, graph: Graph, scale: Tensor | None, ranks: Ranks | None, advice: str) -> None:
        """Raises RuntimeError, on every one of `ranks`, unless a second norm pass gives the norms in the slots. See
        `repeat`."""
        devices = list(self._state.devices.values())
        kept = [device.slots.clone() for device in devices]
        if (
            ranks is None and self._ranks is not None
        ):  # only this rank checks: its slots hold norms of averaged gradients
            self._look(step, graph, scale, None)
        first = [device.slots.clone() for device in devices]
        look_again(lambda: self._look(step, graph, scale, ranks), self, self._trained_model(), devices, advice)
        second = [device.slots.clone() for device in devices]
        indices = differing(self._records, first, second)
        number = torch.tensor(float(len(indices)), dtype=torch.float64, device=self._state.norm.device)
        if ranks is not None:
            ranks.sum_(number)
        if number.item():
            raise difference(self._records, indices, first, second, graph, advice)
        for device, slots in zip(devices, kept, strict=True):
            device.slots.copy_(slots)

    def _drop_norm(self) -> None:
        """Drops a norm that `grad_norm` found and no `fused_backward` used."""
        if self._norm_is_known:
            self._norm_is_known = False
            self._state.abandon_step()

    def _check_reentrancy(self, step: Step, graph: Graph, scale: Tensor | None) -> None:
        """With one backward, a gradient that comes twice must be found before a weight has changed.

        So if the number of reentrant checkpoints is new, a norm pass runs before the update. It sends nothing between
        ranks whose graphs may differ: the other ranks may not run it.
        """
        count = graph.reentrant_checkpoints(thorough=self._checkpoints is None)
        if count and count != self._checkpoints:
            ranks = self._ranks if self._ranks is not None and self._ranks.same_graphs else None
            with statistics_kept(self, self._trained_model()):  # only the first step of a run begins so
                self._look(step, graph, scale, ranks)
            if can_compare(list(self._state.devices.values())):
                self._check_repeats(step, graph, scale, ranks, CHECKPOINTS)
        self._checkpoints = count or self._checkpoints or 0

    def _sweep(self, step: Step, sweep: Pass, graph: Graph, scale: Tensor | None, *, retain_graph: bool) -> None:
        """One backward in which hooks hand their gradients to `sweep`."""
        step.isolate([] if scale is None and not retain_graph else self._foreign_leaves(graph))
        step.sink = sweep
        step.enter(OptimizerBackward(self))
        run_backward(graph.loss, scale, retain_graph)
        step.rejoin(scale, wanted=not retain_graph)
        step.leave()
        sweep.flush()
        step.sink = None
        if not any(record.fired == sweep.serial for record in self._records):
            raise RuntimeError(
                "Lomo: no gradient came. The loss depends on none of the optimizer's parameters, or only on copies of "
                "them (model and optimizer were pickled apart?). Make the optimizer after fully_shard, "
                "parallelize_module, deepcopy and all else that replaces parameters. Use fully_shard, not FSDP1 "
                "(FullyShardedDataParallel). Under set_requires_gradient_sync(False) use optimizer.accumulate()"
            )

    def _foreign_leaves(self, graph: Graph) -> list[Tensor]:
        """Leaves of `graph` that may get a gradient and that no `Lomo` manages."""
        return unmanaged([*graph.leaves, *(() if self._ranks is None else self._ranks.leaves())])

    def _add_to_kept(self, step: Step, loss: Tensor, kept: list[tuple[Record, Tensor]]) -> None:
        """One backward that adds to ``.grad``, with the loss scale of the gradients that are there."""
        fresh = all(record.zeroed for record, _ in kept)
        if fresh and self._state.scale.used:
            self._kept_scale, self._kept_dtype = self._state.scale.of(loss), loss.dtype
        scale = self._kept_scale if self._carries_scale(kept) or fresh else None
        if scale is not None and loss.dtype is not self._kept_dtype:
            raise RuntimeError(
                f"Lomo: the loss has dtype {loss.dtype}, expected {self._kept_dtype} as in the parts before. "
                "The loss scale is rounded to this dtype, so all parts of a step need the same"
            )
        step.isolate([] if scale is None else self._foreign_leaves(Graph(loss)))
        step.adds_scaled = scale is not None
        step.enter(OptimizerBackward(self))
        run_backward(loss, scale, retain_graph=False)
        step.adds_scaled = False
        step.rejoin(scale, wanted=True)
        step.leave()

    def _apply_plain(self, step: Step) -> None:
        with torch.no_grad():
            self._refresh()
            self._apply_kept(step, keep=True)

    def _apply_kept(self, step: Step, *, keep: bool) -> None:
        """One step from the gradients in ``.grad``. They stay there if `keep`."""
        self._drop_norm()
        kept = self._kept()
        scaled = self._carries_scale(kept)
        assert not scaled or self._kept_scale is not None
        self._state.unscale_by(self._kept_scale if scaled else None)
        if not keep:
            step.consume()
        if self._ranks is not None:
            kept = self._ranks.kept(kept, copy=keep)
        self._state.zero_slots()
        if self._needs_norm_first:
            norm = NormPass(self._state.devices, scaled=scaled or self._state.divides)
            for record, grad in kept:
                norm.add(record, grad)
            norm.flush()
            self._state.decide(self._clip_grad_norm)
            self._raise_if_not_finite(step, scaled, _NOTHING_CHANGED)
        update = self._update_pass(step, scaled)
        while kept:
            update.add(*kept.pop())
        update.flush()
        self._finish(step, scaled)

    def _has_gradients(self) -> bool:
        return any(record.param.grad is not None for record in self._records)

    def _kept(self) -> list[tuple[Record, Tensor]]:
        """The gradients that plain backwards left in ``.grad``."""
        return [(record, grad) for record in self._records if (grad := record.param.grad) is not None]

    def _unreduced(self) -> bool:
        """Whether FSDP2 holds gradients of backwards without synchronisation. Only the first of two passes would see
        them, so they need one backward into ``.grad``. Raises RuntimeError if they may lack the loss scale."""
        if self._ranks is None or not self._ranks.unreduced():
            return False
        if self._state.scale.used:
            raise RuntimeError(
                "Lomo: gradients of backwards under set_requires_gradient_sync(False) wait in FSDP2. They may lack the "
                "loss scale. Leave synchronisation on and use optimizer.accumulate(). No weight was changed"
            )
        return self._needs_norm_first

    def _carries_scale(self, kept: list[tuple[Record, Tensor]]) -> bool:
        """Whether gradients in ``.grad`` carry the loss scale. Raises RuntimeError if only some do."""
        if self._kept_scale is None:
            return False
        kinds = {record.scaled for record, _ in kept if not record.zeroed}
        if len(kinds) == 2:
            raise RuntimeError(
                "Lomo: some gradients in .grad carry the loss scale (from accumulate()) and some do not (from a plain "
                f"backward). {_ONE_KIND}"
            )
        return True in kinds

    def _update_pass(self, step: Step, scaled: bool, ranks: Ranks | None = None) -> UpdatePass:
        step.update = UpdatePass(
            self._state.devices,
            self._params_of_fused(),
            scaled=scaled or self._state.divides,
            ranks=ranks,
            decided=self._needs_norm_first,
            stochastic=self._stochastic,
            seed=self._seed,
        )
        return step.update

    def _params_of_fused(self) -> list[Tensor]:
        return [record.param for record in self._records if record.served] if self._takers else []

    def _finish(self, step: Step, scaled: bool) -> None:
        step.applied = True
        if not self._needs_norm_first:
            self._state.decide(None)
            outcome = (
                "elements whose gradient is not finite were kept, the others were updated (with clip_grad_norm or "
                "dynamic loss scaling, all would have been kept)"
            )
            self._raise_if_not_finite(step, scaled, outcome)
        self._end(step, scaled)

    def _raise_if_not_finite(self, step: Step, scaled: bool, outcome: str) -> None:
        """Ends the step with an error if ``nonfinite="raise"`` and the norm is not finite."""
        if self._raise and self._state.home.found_inf.item():
            names = [record.name for record in self._records if not record.slot.isfinite().item()]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self._end(step, scaled)
            where = f"in {', '.join(names[:5])}{more}" if names else "on another rank"
            raise FloatingPointError(f"Lomo: the gradient is not finite {where}; {outcome}")

    def _end(self, step: Step, scaled: bool) -> None:
        """Counts the step, updates the loss scale, and informs the ranks' engine, schedulers and autocast."""
        if self._ranks is not None:
            self._ranks.end()
        self._state.end_step(scaled)
        self._trained = True
        torch.clear_autocast_cache()  # it may hold low-precision copies of the weights before the update
        step.ended = True
        self._unpickled = False
        self._opt_called = True  # what schedulers look at to see that the optimizer went before them

    # ---- Parameters and their hooks ---------------------------------------------------------------------------------

    def _on_plain_gradient(self, record: Record) -> None:
        """Called when a gradient was added to ``.grad``. Records whether it carries the loss scale."""
        if record.param.grad is None:  # a custom layer that keeps it to itself
            return
        record.zeros = None  # FSDP2 adds to the shard inside a DTensor, whose version stays as it was
        if self._step is not None and self._step.adds_scaled:
            record.scaled_grad, record.grad_scale = record.param.grad, self._kept_scale
        elif record.scaled:
            raise RuntimeError(
                f"Lomo: a plain backward added to the gradient of {record.name}. accumulate() left this gradient with "
                f"the loss scale in it. {_ONE_KIND}"
            )

    def _refresh(self, loss: Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Reads what changed since the last step: hyperparameters, devices, dtypes, what is frozen, the loss scale."""
        self._check_not_ended()
        self._check_groups()
        for record in self._records:
            if self._ranks is not None:
                self._ranks.place(record)
            unfrozen = record.param.requires_grad and not record.served
            stale = self._stale or unfrozen
            if stale or record.local.dtype is not record.dtype or record.local.device != record.device:
                self._place()
            record.forget_old_grad()
        self._hook_all()
        if loss is not None:
            self._scale_float16(loss)
        if not self._warned_of_momentum and (text := unused_momentum(self.param_groups)):
            self._warned_of_momentum = True
            warnings.warn(text, stacklevel=8)
        self._state.refresh(self.param_groups, lr)

    def _check_groups(self) -> None:
        """Raises RuntimeError if `param_groups` hold other parameters than the ones with this optimizer's hooks."""
        params = [param for group in self.param_groups for param in group["params"]]
        if len(params) != len(self._records):
            raise RuntimeError(f"Lomo: parameters were put into or taken out of param_groups{_NOT_OURS}")
        for record, param in zip(self._records, params, strict=True):
            if param is not record.param:
                raise RuntimeError(f"Lomo: {record.name} was exchanged in param_groups{_NOT_OURS}")

    def _check_not_wrapped(self) -> None:
        """Raises RuntimeError on a wrapper that is a subclass of `Lomo`. Such a wrapper reads the optimizer's
        attributes, but writes its own."""
        if self._itself() is not self:
            raise RuntimeError(
                f"Lomo: this is a {type(self).__name__} around the optimizer. A step on it would be incomplete. Call "
                "the optimizer itself: the wrapper's .optimizer. No weight was changed"
            )

    def _check_not_ended(self) -> None:
        if self._ended:
            raise RuntimeError(f"Lomo: {self._ended}")

    def _place(self) -> None:
        """Makes the device state again: parameters were added, or moved to another device or dtype."""
        for record in self._records:
            check_parameter(record.name, record.param)
            record.served = is_served(record.param)
        self._drop_norm()
        self._stale = True
        self._state = State(self._records, self.param_groups, self._wanted_scale, ranks=self._ranks, before=self._state)
        self._repeat_state()
        self._stale = False

    def _join_ranks(self, records: Sequence[Record], groups: Sequence[dict[str, Any]]) -> Ranks | None:
        """Finds the processes that take part in training these parameters, and starts from the same everywhere."""
        ranks = ranks_of(records, self._process_group, stochastic=self._stochastic)
        if ranks is None:
            return None
        if self._model is not None:
            raise ValueError(
                "Lomo: fused_layers apply a weight's gradient from its factors, which are this rank's own; over "
                "several ranks the gradient has to be summed first, and so to exist. Use fused_layers=False"
            )
        for record in records:
            ranks.place(record)
        ranks.agree(
            {
                "parameters": [
                    (one.name, tuple(shape_of(one.param)), one.param.dtype, is_here(one.param)) for one in records
                ],
                "frozen parameters": [one.param.requires_grad for one in records],
                "hyperparameters": [(len(group["params"]), *numbers_of(group)) for group in groups],
                "options": (self._clip_grad_norm, self._one_pass, self._wanted_scale, self._stochastic, self._raise),
                "seeds": self._seed,
            }
        )
        ranks.start(records, None if self._whole is None else self._whole())
        return ranks

    def _check_still_there(self) -> None:
        """Checks once, before the first step, that the model still has the parameters with the hooks.

        FSDP2 replaces parameters while it runs, so under FSDP2 they are not compared.
        """
        for record in self._records:
            if record.local is not local_of(record.param):
                raise RuntimeError(
                    f"Lomo: {record.name} was cut into parts since the optimizer was made. Make the optimizer after "
                    "deepspeed.initialize, from the engine. No weight was changed"
                )
        model = None if self._whole is None else self._whole()
        if model is None or self._ranks is not None:
            self._whole = None
            return
        theirs = {id(param): param for param in model.parameters()}
        lost = [record.name for record in self._records if id(record.param) not in theirs]
        if lost and any(param.requires_grad and key not in self._ids for key, param in theirs.items()):
            raise RuntimeError(
                f"Lomo: the model's {lost[0]} is another parameter than when the optimizer was made, and the new one "
                "has no hook. Make the optimizer after fully_shard, parallelize_module and all else that replaces "
                "parameters. No weight was changed"
            )
        self._whole = None

    @property
    def _is_stepping(self) -> bool:
        """Whether a step is under way, in whatever thread."""
        return self._step is not None

    def _replace_owners(self, records: Sequence[Record]) -> None:
        """Ends the use of other optimizers that manage some of `records`. Raises RuntimeError if one is amid a step."""
        former: dict[int, Lomo] = {}
        for record in records:
            owner = owner_of(record.param)
            if owner is None or owner is self:
                continue
            if owner._is_stepping:
                raise RuntimeError(
                    f"Lomo: {record.name} is managed by another Lomo, which is amid a step. Nothing was changed. "
                    "Make the new optimizer after this step"
                )
            former[id(owner)] = owner
        for owner in former.values():
            owner._end_use(
                "this optimizer was replaced by a newer Lomo, which took over some or all of its parameters. A "
                "parameter has one optimizer. Use the newer one, or make another one of the other parameters"
            )

    def _end_use(self, reason: str) -> None:
        """Removes all hooks from the parameters. `reason`: the error message of a later use."""
        _let_go(id(self), self._claimed, self._records, self._handles, self._takers, self._fused)
        self._ended = self._ended or reason

    def _attach(self) -> None:
        """Registers this optimizer as the owner of all its parameters, and puts hooks on those that are trained."""
        self._claimed[:] = [id(record.param) for record in self._records]  # first: see `_fuse`
        claim(self._claimed, self)
        self._hook_all()
        model = None if self._model is None else self._model()
        if model is not None:
            self._fuse(model)

    def _hook_all(self) -> None:
        """Puts hooks on trainable parameters without a hook: all at first, later those that were unfrozen or swapped.

        `torch.utils.swap_tensors` exchanges a parameter's memory and its dict of attributes. The hooks stay, but torch
        does not call them any more. This is called before every backward, also one of another optimizer.
        """
        for record in self._records:
            if record.attributes is record.param.__dict__ and (record.hooked or not record.param.requires_grad):
                continue
            param: Any = record.param
            if record.attributes is not param.__dict__:
                if record.hooked:
                    param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks  # makes torch call them
                record.attributes = param.__dict__
            if not record.hooked and param.requires_grad:
                hook = _hook(weakref.ref(self), record)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
                record.hooked = (
                    True  # last: an interrupt before this line leaves a second hook, which finds no gradient
                )

    def _fuse(self, model: nn.Module) -> None:
        """Fuses the layers of `model` that can be fused and whose weights this optimizer manages."""
        records = {id(record.param): record for record in self._records}
        known = {id(reference()) for reference in self._fused}
        for module, reason in layers_of(model, records):
            if reason is not None:
                continue
            record = records[id(module.weight)]
            new = id(module) not in known
            if new:  # also where another optimizer fused it, whose weight was exchanged since
                self._fused.append(weakref.ref(module))  # first: so that a layer is unfused even after an interrupt
                fuse(module)
            record.reused |= record.fused and new
            if not record.fused:
                record.fused = True
                self._takers.append(id(record.param))
                takers[id(record.param)] = _taker(weakref.ref(self), record)

    def _exclusively(self, run: Callable[[Step], _T]) -> _T:
        """Runs one step. Another thread waits. A hook that starts a step inside another one gets an error.

        A step that fails leaves nothing behind. An interrupt (Ctrl-C) may come between any two lines, also while a
        broken step is removed and before the lock is released. So both are done again if needed.
        """
        self._check_not_wrapped()
        self._check_not_inside(_INSIDE)
        try:
            with self._busy:
                return self._run(Step(self._records), run)
        except BaseException:
            if self._busy._is_owned():
                self._busy.release()
            raise

    def _run(self, step: Step, run: Callable[[Step], _T]) -> _T:
        try:
            try:
                self._outcome = step.outcome
                self._step = step
                result = run(step)
                self._outcome = step.outcome
                self._step = None
                return result
            except BaseException:
                self._take_back(step)
                raise
        except BaseException:
            self._take_back(step)
            raise

    def _take_back(self, step: Step) -> None:
        """Removes everything that a failed step has left."""
        if step.taken_back:
            return
        self._step = None
        self._norm_is_known = False
        self._outcome = step.outcome
        step.take_back()
        self._state.forget_norms()
        self._state.level_steps()
        step.taken_back = True
        if step.dropped:
            warnings.warn(
                f"Lomo: a step broke off. The gradients that were in .grad before it were dropped with its own: "
                f"{'it had added to them' if step.outcome == 'unchanged' else 'some weights were updated already'}. "
                "Begin the step again with its first backward",
                stacklevel=6,
            )

    def _check_not_inside(self, refusal: str) -> None:
        """Raises RuntimeError, which says `refusal`, if the caller is inside a step of this optimizer."""
        # On GPUs autograd runs hooks in threads of its own, which would wait here for the step that waits for them.
        in_backward = torch._C._current_graph_task_id() != -1
        if self._busy._is_owned() or (in_backward and self._step is not None):
            raise RuntimeError(f"Lomo: {refusal}")


def _complete(optimizer: Any, state: dict[str, Any]) -> None:
    """Copies all tensors in torch's state dict, and adds the library's entry."""
    for group in state["param_groups"]:
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
    state["state"] = {
        index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in numbers.items()}
        for index, numbers in state["state"].items()  # the optimizer's own dicts: nothing may be put into them
    }
    state[resume.KEY] = {
        "version": resume.VERSION,
        **optimizer._state.export(),
        "seed": optimizer._seed,
        "parameters": resume.layout(optimizer._records),
    }


def _cut(some: list[Any], length: int) -> list[Any]:
    """Shortens a list to `length`, and returns the removed end."""
    beyond = some[length:]
    del some[length:]
    return beyond


def _unpickled(kind: type[Lomo], *parts: Any) -> Lomo:
    optimizer = kind.__new__(kind)
    optimizer._become(*parts)
    optimizer._unpickled = True
    return optimizer


def _hook(optimizer: weakref.ref[Lomo], record: Record) -> Callable[[Tensor], None]:
    """The hook of one parameter. It does not keep the optimizer alive."""

    def on_gradient(_: Tensor) -> None:
        owner = optimizer()
        if owner is None:
            return
        backward = optimizer_backward()
        if backward is not None and backward.optimizer is not owner:
            backward.drop(record.param)
            owner._passed_over = True
        elif (step := owner._step) is not None and step.sink is not None:
            step.sink.take(record)
        else:
            owner._on_plain_gradient(record)

    return on_gradient


def _taker(optimizer: weakref.ref[Lomo], record: Record) -> Callable[[Pair], Sequence[Pair]]:
    """What a fused layer of the parameter calls with its factors. It does not keep the optimizer alive."""

    def on_pair(pair: Pair) -> Sequence[Pair]:
        owner = optimizer()
        if owner is None:
            return (pair,)
        backward = optimizer_backward()
        if backward is not None and backward.optimizer is not owner:
            return ()  # its gradient would be dropped
        step = owner._step
        return (pair,) if step is None or step.sink is None else step.sink.take_pair(record, pair)

    return on_pair


def _let_go(optimizer_id: int, claimed: list[int], records: Sequence[Record], *attached: Any) -> None:
    """Removes an optimizer from its parameters: `attached` (see `_detach`), and the loss scale in gradients."""
    release(claimed)
    forget(optimizer_id)
    _detach(*attached)
    unscale_grads(records)


def _detach(
    handles: list[torch.utils.hooks.RemovableHandle], ids: list[int], fused: list[weakref.ref[nn.Module]]
) -> None:
    """Removes an optimizer's hooks, and makes its fused layers plain ones again."""
    while handles:
        handles.pop().remove()
    while ids:
        takers.pop(ids.pop(), None)
    unfuse(fused)
    fused.clear()


def _model_of(model_or_params: Any, fused_layers: bool | nn.Module) -> nn.Module | None:
    """The model in which layers are to be fused; None: nowhere."""
    if isinstance(fused_layers, nn.Module):
        return fused_layers
    if not isinstance(fused_layers, bool):
        raise TypeError(f"Lomo: fused_layers is a {type(fused_layers).__name__}, expected True, False or the model")
    if not fused_layers:
        return None
    if not isinstance(model_or_params, nn.Module):
        raise ValueError(
            "Lomo: fused_layers=True needs the model, to find its layers; with parameters or groups pass it there: "
            "fused_layers=model"
        )
    return model_or_params
