"""`Lomo`: SGD whose update happens inside backward (arXiv 2306.09782)."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..ops.sgd import is_stochastic
from . import copies, resume
from .accumulation import Accumulation
from .attachment import Attachment
from .graph import Graph, check_fused_weights, check_loss, run_backward
from .hyperparameters import check_group, check_positive, check_seed, numbers_of, unused_momentum
from .owners import OptimizerBackward, other_owners, unmanaged
from .parameters import (
    check_apart,
    check_groups,
    check_parameter,
    check_unchanged,
    is_served,
    model_to_fuse,
    name_of,
    named_groups,
)
from .passes import KeepPass, NormPass, Pass, UpdatePass
from .ranks import Ranks, is_engine, is_here, ranks_of, shape_of
from .records import Record
from .repeat import Repeats
from .scaling import LossScale, check_no_grad_scaler, computes_in_float16
from .state import State
from .step import Step, Steps
from .step_hooks import as_step
from .summary import summary
from .transaction import all_or_nothing

_NOTHING_CHANGED = "no weight was changed"


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
            keeps the factors if they are smaller (`docs/choosing.md`). Fastest.
        loss_scale: None, a number, "dynamic", or "auto". "auto" is dynamic if a parameter is float16, or if the first
            backward computes in float16, as under autocast. Over several processes autocast only gives a warning.
        rounding: "nearest" or "stochastic", of bfloat16 and float16 parameters. Stochastic rounding is unbiased:
            updates far below a weight's last bit still count on average.
        nonfinite: "skip": a step whose gradient is not finite is counted in `skipped_steps`; with clipping or dynamic
            scaling it leaves all weights untouched, otherwise the elements concerned. "raise": it also raises
            FloatingPointError, which takes a host synchronisation per step.
        fused_layers: True: the weights of the model's `nn.Linear`, `nn.Embedding` and (GPT-2) `Conv1D` get no gradient;
            their updates are formed from the gradient's factors, tile by tile. If you pass parameters or groups, pass
            the model here. `summary` says which weights are fused.
        process_group: False: none. A `torch.distributed.ProcessGroup`: data parallel without a wrapper. Gradients are
            averaged over the group inside backward, and parameters and buffers start as its first rank's. Not for
            DTensor parameters (FSDP2, tensor parallel): make the optimizer after ``fully_shard`` or
            ``parallelize_module``, without this argument. If you pass parameters or groups of DeepSpeed's engine, pass
            the engine here. See `docs/distributed/README.md`.
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
        model = model_to_fuse(model_or_params, fused_layers)
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
        self._attachment = Attachment(self, self._records, model)
        self._steps = Steps(self._records)
        self._accumulation = Accumulation(self._records)
        self._accumulating = False
        self._norm_is_known = False  # grad_norm() was called and fused_backward() not yet
        self._warned_of_step = False
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
        self._repeats = Repeats(self, self._records, self._whole if model is None else weakref.ref(model))
        self._stale = False  # `_place` was begun and not ended
        self._stepping: set[int] = set()  # threads in which step hooks are called now
        defaults = {"lr": lr, "weight_decay": weight_decay, "clip_grad_value": clip_grad_value}
        defaults["momentum"] = 0.0  # is not used; OneCycleLR and CyclicLR want to set it
        super().__init__(named_groups(model_or_params), defaults)
        self._ranks = self._join_ranks(self._records, self.param_groups)
        self._state = State(self._records, self.param_groups, loss_scale, ranks=self._ranks)
        self._repeat_state()
        managed = {id(record.param) for record in self._records}
        if model is not None and managed.isdisjoint(id(param) for param in model.parameters()):
            raise ValueError("Lomo: fused_layers is a module with none of the parameters given, expected their model")
        self._replace_owners(self._records)
        self._attachment.attach()
        self._attached = True

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
        self._steps.run(self, lambda step: self._train(step, loss))

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

    @as_step(lambda self, closure=None: closure is not None or self._accumulation.has_gradients())
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the gradients that plain backwards left in ``.grad``. They stay there. If there are none, as after
        `backward`, this does nothing and calls no step hooks.

        Args:
            closure: called first, with gradients enabled; its result is returned.
        """
        self._check_not_ended()
        self._steps.check_not_inside()
        trained, self._trained = self._trained, False
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_groups(self._records, self.param_groups)
        if self._step_supports_amp_scaling and hasattr(self, "found_inf"):
            del self.found_inf
            raise RuntimeError(
                "Lomo: torch's GradScaler decides on every rank alone whether to step, from gradients that are not "
                'summed over the ranks yet. Use optimizer.backward(loss) and loss_scale="dynamic" in its place. No '
                "weight was changed"
            )
        if self._accumulation.has_gradients():
            if not self._warned_of_step:
                self._warned_of_step = True
                warnings.warn(
                    "Lomo.step() applies gradients that a plain backward has kept in memory, all of them. "
                    "optimizer.backward(loss) in place of loss.backward() frees each gradient as soon as it exists",
                    stacklevel=3,  # `as_step` wraps step() once, twice where there are hooks
                )
            self._steps.run(self, self._apply_plain)
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
            if self._accumulation.gradients():
                raise RuntimeError(
                    "Lomo: grad_norm() found gradients in .grad, expected none; use backward(), which includes them, "
                    "or zero_grad(), which drops them"
                )
            self._find_norm(step, Graph(loss), self._start_scale(loss))
            self._norm_is_known = True
            return self.last_grad_norm

        return self._steps.run(self, find)

    @as_step(lambda self, *_, **__: not self._accumulating)
    def fused_backward(self, loss: Tensor, lr: float | Tensor) -> None:
        """lomo_optim's name for `backward`, with the learning rate of all groups given for this step.

        After `grad_norm` it runs one backward, otherwise both: an old norm is never used.
        """

        def run(step: Step) -> None:
            check_group({"lr": lr, "weight_decay": 0.0, "clip_grad_value": None}, "Lomo.fused_backward")
            self._train(step, loss, lr, after_grad_norm=True)

        self._steps.run(self, run)

    def summary(self) -> str:
        """A table to print: what happens to each parameter's gradient, and why."""
        kept = self._one_pass and self._needs_norm_first
        return summary(self._records, self._attachment.model, kept=kept)

    def remove(self) -> None:
        """Takes the hooks off and lets another optimizer have the parameters. The optimizer cannot be used again.

        Raises:
            RuntimeError: a hook called it inside a step. The gradients that come later would stay in ``.grad``.
        """
        self._check_not_wrapped()
        self._steps.check_not_inside("remove() was called inside a step of the same optimizer; call it after the step")
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
        return self._steps.outcome

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
            all_or_nothing(self, functools.partial(self._add_later, group, records))
        else:
            self._add(group, records)

    def _add(self, group: dict[str, Any], records: Sequence[Record]) -> None:
        super().add_param_group(group)
        self._records.extend(records)

    def _add_later(self, group: dict[str, Any], records: Sequence[Record]) -> None:
        ranks = self._join_ranks([*self._records, *records], [*self.param_groups, group])
        self._add(group, records)
        self._ranks = ranks
        self._place()
        self._replace_owners(records)
        self._attachment.attach()

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with ``"lomo"``: step, loss scale, growth tracker, skipped steps, seed and parameters.

        ``"state"`` repeats these numbers for each parameter, because `torch.distributed.checkpoint` keeps nothing else.
        All tensors are copies.
        """
        handle = self.register_state_dict_post_hook(
            resume.add_entry, prepend=True
        )  # before the user's, who see all of it
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
        all_or_nothing(self, functools.partial(self._load, state_dict))

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

    # ---- Copies -----------------------------------------------------------------------------------------------------

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "Lomo: copy.copy would make a second optimizer of the same parameters. Use the optimizer itself, or "
            "copy.deepcopy((model, optimizer))"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copies.deep_copy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return copies.pickled(self)

    def _become(self, groups: list[dict[str, Any]], settings: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Initialises a new object from `copies.Parts`."""
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
            check_unchanged(self._records, self._whole() if self._ranks is None else None)
            self._whole = None
        known, self._norm_is_known = self._norm_is_known, False
        kept = self._accumulation.gradients()
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
            if self._attachment.fuses:
                check_fused_weights(loss)
            self._repeats.check_checkpoints(graph, self._state, lambda ranks: self._look(step, graph, scale, ranks))
            self._state.zero_slots()
        self._sweep(step, self._update_pass(step, scaled, self._ranks), graph, scale, retain_graph=False)
        self._finish(step, scaled)

    def _check_loss(self, loss: Tensor) -> None:
        """Raises TypeError, ValueError or RuntimeError unless `loss` is one number, and no GradScaler has scaled it."""
        check_loss(loss)
        if not self._looked_for_scaler:  # once: some loops multiply by another tensor each time
            self._looked_for_scaler = check_no_grad_scaler(loss)

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
        self._repeats.check_clipping(graph, self._state, lambda ranks: self._look(step, graph, scale, ranks))

    def _look(self, step: Step, graph: Graph, scale: Tensor | None, ranks: Ranks | None) -> None:
        """A backward that sets the slots to zero, adds up norms in them, and keeps the graph for another backward."""
        self._state.zero_slots()
        scaled = scale is not None or self._state.divides
        norms = NormPass(self._state.devices, scaled=scaled, ranks=ranks)
        self._sweep(step, norms, graph, scale, retain_graph=True)

    def _drop_norm(self) -> None:
        """Drops a norm that `grad_norm` found and no `fused_backward` used."""
        if self._norm_is_known:
            self._norm_is_known = False
            self._state.abandon_step()

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
        scale = self._accumulation.scale_for(loss, kept, self._state.scale)
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
        kept = self._accumulation.gradients()
        scale = self._accumulation.scale_of(kept)
        scaled = scale is not None
        self._state.unscale_by(scale)
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
        return [record.param for record in self._records if record.served] if self._attachment.fuses else []

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

    # ---- Parameters -------------------------------------------------------------------------------------------------

    def _refresh(self, loss: Tensor | None = None, lr: float | Tensor | None = None) -> None:
        """Reads what changed since the last step: hyperparameters, devices, dtypes, what is frozen, the loss scale."""
        self._check_not_ended()
        check_groups(self._records, self.param_groups)
        for record in self._records:
            if self._ranks is not None:
                self._ranks.place(record)
            unfrozen = record.param.requires_grad and not record.served
            stale = self._stale or unfrozen
            if stale or record.local.dtype is not record.dtype or record.local.device != record.device:
                self._place()
            if record.scaled_grad is not None or record.zeros is not None:
                record.forget_old_grad()
        self._attachment.hook_all()
        if loss is not None:
            self._scale_float16(loss)
        if not self._warned_of_momentum and (text := unused_momentum(self.param_groups)):
            self._warned_of_momentum = True
            warnings.warn(text, stacklevel=8)
        self._state.refresh(self.param_groups, lr)

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
        if self._attachment.model is not None:
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

    def _replace_owners(self, records: Sequence[Record]) -> None:
        """Ends the use of other optimizers that manage some of `records`. Raises RuntimeError if one is amid a step."""
        for owner in other_owners(records, self):
            owner._end_use(
                "this optimizer was replaced by a newer Lomo, which took over some or all of its parameters. A "
                "parameter has one optimizer. Use the newer one, or make another one of the other parameters"
            )

    def _end_use(self, reason: str) -> None:
        """Removes all hooks from the parameters. `reason`: the error message of a later use."""
        self._attachment.remove()
        self._ended = self._ended or reason
