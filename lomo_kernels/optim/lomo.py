"""`Lomo`: SGD whose update happens inside backward (arXiv 2306.09782)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from . import copies, resume, split
from .engines.choose import is_engine
from .factored_rules import FactoredRule
from .groups import add_group
from .parameters import model_to_fuse, named_groups
from .plain_steps import PlainSteps
from .settings import Settings
from .step_hooks import as_step
from .training import Training
from .training_step import TrainingStep
from .transaction import all_or_nothing

_T = TypeVar("_T")


class Lomo(torch.optim.Optimizer):
    """SGD without momentum. It updates each parameter and frees its gradient while backward runs.

    ``optimizer.backward(loss)`` takes the place of ``loss.backward()``, ``optimizer.step()`` and
    ``optimizer.zero_grad()``. Only `backward` (and `fused_backward`) frees gradients. A plain ``loss.backward()``
    leaves gradients in ``.grad``, and `step` applies them. So any trainer can use `Lomo` as a `torch.optim.Optimizer`.
    A parameter has one optimizer. A newer `Lomo` takes it over, and the older `Lomo` cannot be used any more.

    Per element, with g the gradient over the loss scale (`lomo_kernels.reference` states it bit for bit)::

        p = (1 - lr * weight_decay) * p - lr * min(1, clip_grad_norm / (norm + 1e-6)) * clamp(g)

    Args:
        model_or_params: an `nn.Module`, an iterable of parameters or of (name, parameter) pairs, or torch parameter
            groups, in which ``lr``, ``weight_decay`` and ``clip_grad_value`` may differ. float32, bfloat16 or float16;
            frozen ones of any dtype. Or the engine of DeepSpeed's ZeRO-3 (`lomo_kernels.optim.engines.zero3`).
        lr: learning rate, a number or a one-element tensor; read from ``param_groups`` at every step.
        clip_grad_norm: bound on the L2 norm over all parameters of the unscaled, unclamped gradient. Exact. The norm is
            known only after a backward pass: see `clip_memory`.
        clip_grad_value: bound on each element of the gradient, applied before the norm's coefficient.
        clip_tensor: AdaGC: the norm of each parameter's gradient is bounded by `clip_tensor` (1.04 in the paper) times
            a running mean of its own norms, in one backward. The first 100 steps find the means. `clip_grad_norm` clips
            these steps only. `lomo_kernels.optim.tensor_clip` states the rule. Not with the rules "tensor", "rows" and
            "adalomo".
        weight_decay: decoupled.
        clip_memory: bytes of gradients or factors that may wait for the norm (of clipping, of dynamic loss scaling): a
            number, or a text such as "2GiB". It keeps the gradients that come last in backward. The other layers, those
            nearest to the loss, run backward twice. 0: all layers do; least memory. None: no layer does; fastest.
            "auto": on a GPU what is free, less a tenth of the GPU's memory; on a CPU all gradients, as torch's SGD
            keeps. Several ranks or reentrant checkpoints: all gradients are kept, or none (`docs/choosing.md`).
        clip_passes: "one" is another name for ``clip_memory=None``, and "two" for 0.
        loss_scale: None, a number, "dynamic", or "auto". "auto" is dynamic if a parameter is float16, or if the first
            backward computes in float16, as under autocast. Autocast only gives a warning over several processes.
        rounding: of bfloat16 and float16 parameters: "nearest"; "stochastic", which is unbiased: updates far below a
            weight's last bit still count on average; or "split", for bfloat16: what a weight has no room for is kept, 2
            bytes per element. The two parts are exactly the float32 weight (`docs/numerics.md`).
        nonfinite: "skip": a step whose gradient is not finite is counted in `skipped_steps`; with clipping or dynamic
            scaling all weights stay as they are. Otherwise the elements that are not finite keep their weights; with
            `clip_tensor`, "tensor", "rows" and "adalomo" the whole parameter does (with "rows" in a fused linear layer,
            the row). "raise": it also raises FloatingPointError, which takes a host synchronisation per step.
        fused_layers: True: the weights of the model's `nn.Linear`, `nn.Embedding`, (GPT-2) `Conv1D` and (torch 2.13)
            `nn.LinearCrossEntropyLoss` get no gradient. Their updates are formed tile by tile from the gradient's
            factors: the layer's input and the gradient of its output. Pass the model here if you pass parameters
            or groups. `summary` says which weights are fused. The rules "tensor" and "adalomo" form a linear layer's
            gradient once. Gated feed-forward layers (SwiGLU) keep less for backward. Not over several ranks.
        process_group: False: none. A `torch.distributed.ProcessGroup`: data parallel without a wrapper. Gradients are
            averaged over the group inside backward, and parameters and buffers start as its first rank's. Not for
            DTensor parameters (FSDP2, tensor parallel). Pass DeepSpeed's engine here if you pass its parameters or
            groups. See `docs/distributed/README.md`.
        seed: keys the stochastic rounding, with each parameter's position in ``param_groups`` and the step.
        rule: "sgd"; "sign" (SignSGD): each element of the clipped gradient counts as 1 or -1, or 0 if it is zero; or
            "tensor", "rows", "adalomo" (`lomo_kernels.optim.factored_rules`), without `clip_tensor`.

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
        clip_tensor: float | None = None,
        clip_memory: float | str | None = "auto",
        clip_passes: str | None = None,
        loss_scale: float | str | None = "auto",
        rounding: str = "nearest",
        nonfinite: str = "skip",
        fused_layers: bool | nn.Module = False,
        process_group: Any = False,
        seed: int = 0,
        rule: str | FactoredRule = "sgd",
    ) -> None:
        if is_engine(model_or_params):
            if process_group is not False:
                raise ValueError("Lomo: a DeepSpeed engine has its own process group; leave process_group out")
            engine: Any = model_or_params
            model_or_params, process_group = engine.module, engine
        model = model_to_fuse(model_or_params, fused_layers)
        clips = clip_grad_norm, clip_memory, clip_passes, clip_tensor
        settings = Settings.checked(*clips, loss_scale, rounding, nonfinite, seed, process_group, rule)
        is_model = isinstance(model_or_params, nn.Module)
        given_model: Callable[[], Any] = weakref.ref(model_or_params) if is_model else lambda: None
        self._itself = weakref.ref(self)  # not so through a wrapper made of this class, as Lightning makes
        self._training = Training(self, settings, model, given_model)
        self._plain_steps = PlainSteps(self._training)
        self._stepping: set[int] = set()  # threads in which step hooks are called now
        # momentum is not used; OneCycleLR and CyclicLR want to set it
        defaults = {"lr": lr, "weight_decay": weight_decay, "clip_grad_value": clip_grad_value, "momentum": 0.0}
        super().__init__(named_groups(model_or_params), defaults)
        self._training.start()

    # ---- What a user calls ------------------------------------------------------------------------------------------

    @as_step(lambda self, *_, **__: not self._training.accumulating)
    def backward(self, loss: Tensor) -> None:
        """One step of training: runs backward, applies every gradient and frees it. Each gradient is applied as soon as
        it exists if no norm of all gradients is needed.

        Weights change when the norm is known if `clip_grad_norm` or dynamic loss scaling is used. A part of backward,
        or all of it, runs twice if there is no room to keep all gradients until then (see `clip_memory`). Gradients
        that plain backwards (or `accumulate`) left in ``.grad`` are part of the step: the new gradients are added to
        them, then all are applied and freed. This call only adds to ``.grad`` inside `accumulate`. Parameters of
        another `Lomo` get no gradient, and their ``.grad`` stays as it was. Leaves that no `Lomo` manages get the
        ``.grad`` of one plain backward.

        torch's step hooks are called before and after a step, except inside `accumulate`: the optimizer's own
        (`register_step_pre_hook`, `register_step_post_hook`) and the global ones. Their args are ``(optimizer, loss)``.

        Args:
            loss: one floating-point element, not scaled.

        Raises:
            TypeError, ValueError, RuntimeError: `loss` is no such tensor or needs no gradient; a parameter's gradient
                is sparse or comes twice; two backwards give different gradients; a hyperparameter is not usable.
            FloatingPointError: the gradient is not finite and ``nonfinite="raise"``. Step post hooks are not called.
        """
        self._run(lambda step: step.backward(loss))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """`backward` only adds its gradients to ``.grad`` inside this context. The next `backward` outside applies the
        sum. Exact.

        All accumulated gradients are dropped, with a warning, if a `backward` inside breaks off (an interrupt, an error
        in a hook) after it has added to some gradients. Then begin the step again.
        """
        self._check_not_wrapped()
        training = self._training
        before = training.accumulating
        try:
            try:
                training.accumulating = True
                yield
            finally:
                training.accumulating = before
        finally:
            training.accumulating = before  # again: an interrupt may have kept the line above from running

    @as_step(lambda self, closure=None: closure is not None or self._training.accumulation.has_gradients())
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the gradients that plain backwards left in ``.grad``. They stay there. This does nothing and calls no
        step hooks if there are no gradients, as after `backward`. `closure` is called first, with gradients enabled;
        its result is returned.
        """
        return self._plain_steps.run(self, closure)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch's GradScaler asks this before it hands `found_inf` and `grad_scale` to `step`, which refuses them."""
        return self._training.state.is_scaled(None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops what plain backwards left in ``.grad``.

        Args:
            set_to_none: False: the tensors stay, filled with zeros, and the next backward adds to them. They count as
                gradients, as in torch's optimizers: weight decay applies to their parameters. So the next `backward`
                has all gradients in memory; it frees them at its end.
        """
        itself = self._itself()
        if itself is not None and itself is not self:  # Lightning's wrapper is made of this class
            itself.zero_grad(set_to_none)
            return
        super().zero_grad(set_to_none=set_to_none)
        self._training.after_zero_grad()

    def grad_norm(self, loss: Tensor) -> Tensor:
        """First call of lomo_optim's pair: a backward for the norm. The next `fused_backward` uses this norm, once.
        Returns the norm, as `last_grad_norm`."""
        self._run(lambda step: step.find_norm(loss))
        return self.last_grad_norm

    @as_step(lambda self, *_, **__: not self._training.accumulating)
    def fused_backward(self, loss: Tensor, lr: float | Tensor) -> None:
        """lomo_optim's name for `backward`, with the learning rate of all groups for this step. It runs one backward
        after `grad_norm`. An old norm is never used."""
        self._run(lambda step: step.fused_backward(loss, lr))

    def summary(self) -> str:
        """A table to print: what happens to each parameter's gradient, and why; after a step, what did not fit."""
        return self._training.summary()

    def remove(self) -> None:
        """Takes the hooks off and lets another optimizer have the parameters. The optimizer cannot be used again.

        Raises:
            RuntimeError: a hook called it inside a step. The gradients that come later would stay in ``.grad``.
        """
        self._check_not_wrapped()
        self._training.steps.check_not_inside(
            "remove() was called inside a step of the same optimizer; call it after the step"
        )
        self._training.end_use("remove() was called on this optimizer; make a new one")

    def __enter__(self) -> Lomo:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def grad_norms(self) -> dict[str, Tensor]:
        """Norm of each parameter's gradient in the last step: unscaled, before clipping of any kind.

        The host does not wait for the device. The norms of several ranks are those of whole parameters and averaged
        gradients. The call is one all-reduce if parameters are sharded: every rank has to call it.

        Returns:
            A dict by name, in the order of ``param_groups``. Norms are copies: float64, no dimensions, on the first
            parameter's device. A norm is zero if the parameter got no gradient; all are zero after a step that broke
            off. The fourth parameter is "parameter 3" if it has no name. A second use of a name gets this text added.
        """
        return self._training.grad_norms()

    @property
    def last_grad_norm(self) -> Tensor:
        """Global L2 norm of the last step's unscaled, unclamped gradient: float64, no dimensions, on the first
        parameter's device. Zero before the first step and after one that broke off. The next step overwrites it."""
        return self._training.state.norm

    @property
    def last_step_outcome(self) -> str | None:
        """What happened to the weights in the last call of `backward`, `fused_backward`, `grad_norm` or `step`, also if
        an exception or an interrupt ended it. None before the first call.

        - ``"complete"``: every gradient was applied (or skipped because it is not finite: see `skipped_steps`).
        - ``"unchanged"``: no weight was changed: `grad_norm`, `accumulate`, or a step that broke off early.
        - ``"partial"``: the step broke off, and some weights may have been updated. The others have their old values.

        The next step after an exception starts from the weights as they are, and uses nothing of the broken step.
        Gradients that were in ``.grad`` before the broken step stay if it has not added to them and has changed no
        weight. Otherwise they are dropped, with a warning.
        """
        return self._training.steps.outcome

    @property
    def loss_scale(self) -> Tensor:
        """The present loss scale: float32, no dimensions, on the first parameter's device. 1 without scaling."""
        return self._training.state.scale.scale

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps whose gradient was not finite: int64, no dimensions, on the first parameter's device."""
        return self._training.state.skipped

    @property
    def step_count(self) -> Tensor:
        """Number of steps, skipped ones included: int64, no dimensions, on the first parameter's device."""
        return self._training.state.primary.step

    # ---- Groups and state -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in `torch.optim.Optimizer`. The new parameters' ids follow the present ones.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: as the constructor; nothing is added then.
        """
        self._check_not_wrapped()
        add_group(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with ``"lomo"``: step, loss scale, growth tracker, skipped steps, seed, rule, means of
        `clip_tensor`, and names and shapes of parameters. AdaLomo's state and the low parts of ``rounding="split"`` are
        only in ``"state"``.

        ``"state"`` repeats these numbers for each parameter, because `torch.distributed.checkpoint` keeps nothing else.
        All tensors are copies.
        """
        handle = self.register_state_dict_post_hook(resume.add_entry, prepend=True)  # before the user's, who see it all
        try:
            return self._training.steps.between("state_dict()", super().state_dict)
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from the step at which `state_dict` was saved, bit for bit. All of it is loaded, or nothing.

        Parameters are compared by position and shape; the position keys a parameter's random bits. They are compared by
        name too if both sides have names; what `torch.compile` and ``checkpoint_wrapper`` add to names is ignored. So
        another order of parameters without names is not noticed if their shapes are equal. The state dict of a
        `torch.optim.SGD` gives learning rates and weight decay. A warning names what is dropped.

        Raises:
            TypeError, ValueError: `state_dict` is not from `Lomo` or SGD, is of other parameters, of another kind of
                loss scaling or of a later version, or has a value that is not possible in a run. Nothing is loaded.
        """
        self._check_not_wrapped()
        all_or_nothing(self, functools.partial(resume.load, self, state_dict))

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

    def _become(
        self, groups: list[dict[str, Any]], settings: dict[str, Any], numbers: dict[str, Any] | None = None
    ) -> None:
        """Initialises an object from `copies.Parts`; as before the first step if there are no `numbers`."""
        Lomo.__init__(self, groups, **settings)  # a subclass may take other arguments
        if numbers is not None:
            self._training.state.load(numbers)
            self._training.state.load_norms(numbers)
            split.load(self._training.managed_params, numbers[split.LOW])

    def _run(self, work: Callable[[TrainingStep], _T]) -> _T:
        self._check_not_wrapped()
        training = self._training
        return training.steps.run(training, lambda step: work(TrainingStep(training, step)))

    def _check_not_wrapped(self) -> None:
        """Raises RuntimeError on a wrapper that is a subclass of `Lomo`. Such a wrapper reads the optimizer's
        attributes, but writes its own."""
        if self._itself() is not self:
            raise RuntimeError(
                f"Lomo: this is a {type(self).__name__} around the optimizer. A step on it would be incomplete. Call "
                "the wrapper's .optimizer, or give Lightning's Trainer a LomoCallback. No weight was changed"
            )
