"""One backward of an optimizer from one loss, whose gradients go to a pass or stay in ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .autograd import Cut, Start, run_backward, shared_recomputation, start_of
from .engines.base import ParallelEngine
from .graph import Graph
from .loss_chain import loss_chain_of
from .managed_parameter import ManagedParameter
from .owners import OptimizerBackward, unmanaged_leaves
from .passes import NormPass, Pass
from .step import Step
from .training import Training


class Backward:
    """The backwards of one step through the graph of `loss`."""

    def __init__(self, training: Training, step: Step, loss: Tensor) -> None:
        self._training = training
        self._step = step
        self.graph = Graph(loss)
        self.scale: Tensor | None = None  # that backward starts with
        engine = training.engine
        #: Whether the first of several passes runs the loss's own nodes for all of them. False: each pass runs them.
        self.runs_loss_once = engine is None or engine.may_skip_loss
        self._after_loss: Start | None = None  # where the next pass begins, if the loss's own nodes have run

    def start_scale(self) -> None:
        """Finds the loss scale, and tells the kernels to divide by it."""
        state = self._training.state
        self.scale = state.scale.of(self.graph.loss) if state.scale.used else None
        state.unscale_by(self.scale)

    @property
    def scaled(self) -> bool:
        """Whether the gradients have to be divided."""
        return self._training.state.is_scaled(self.scale)

    def run_pass(
        self,
        sink: Pass,
        *,
        retain_graph: bool,
        only: Sequence[ManagedParameter] | None = None,
        cut: Cut | None = None,
    ) -> None:
        """One backward in which hooks hand their gradients to `sink`.

        Args:
            retain_graph: for another backward. Unmanaged leaves get their gradient if this is False.
            only: the parameters that get a gradient; None: all leaves of the graph do.
            cut: two parts of the graph, of which only the upper one is retained.
        """
        step = self._step
        unmanaged = (self.scale is not None or retain_graph) and only is None
        step.isolate(self._unmanaged_leaves() if unmanaged else [])
        step.sink = sink
        step.enter(OptimizerBackward(self._training))
        leaves = None if only is None else [managed.param for managed in only]
        last = cut is None and not retain_graph
        grads = {}
        with shared_recomputation(self.runs_loss_once and not last and self._after_loss is None):
            start = self._begin(sink, last=last)
            if cut is not None:
                grads = cut.run_upper(start)
            else:
                run_backward(start, retain_graph, leaves)
        del start
        if cut is not None:
            cut.run_lower(grads)
        step.rejoin(self.scale, wanted=not retain_graph)
        step.leave()
        sink.flush()
        step.sink = None
        if only is None and not any(managed.last_pass == sink.serial for managed in self._training.managed_params):
            raise RuntimeError(
                "Lomo: no gradient came. The loss depends on none of the optimizer's parameters, or only on copies of "
                "them (model and optimizer were pickled apart?). Make the optimizer after fully_shard, "
                "parallelize_module, deepcopy, PEFT's adapters and all else that replaces or adds parameters. Use "
                "fully_shard, not FSDP1 (FullyShardedDataParallel). Under set_requires_gradient_sync(False) use "
                "optimizer.accumulate()"
            )

    def _begin(self, sink: Pass, *, last: bool) -> Start:
        """Where a pass begins. `last`: no pass follows."""
        start, self._after_loss = self._after_loss, None
        if start is None and self.runs_loss_once and not last:
            start = self._run_loss(sink)
        if start is None:
            return start_of(self.graph.loss, self.scale)
        if last or not self.runs_loss_once:
            return start._replace(frees_grad=True)
        self._after_loss = start
        return start

    def _run_loss(self, sink: Pass) -> Start | None:
        """Runs the loss's own nodes, inside a pass, and returns where the pass goes on. None: they did not run."""
        chains = self._training.loss_chains
        chain = loss_chain_of(self.graph.loss)
        if chain is None or not chains.may_run_once(chain):
            self.runs_loss_once = False
            return None
        trusted = chains.is_trusted(chain)
        after_loss = chain.run(start_of(self.graph.loss, self.scale), retain_graph=not trusted)
        hidden = [managed.name for managed in self._training.managed_params if managed.last_pass == sink.serial]
        if not hidden and not self._step.isolated_grads:
            chains.trust(chain)
        else:
            chains.distrust(chain)
            self.runs_loss_once = False  # the next pass needs these gradients again
            if trusted:
                self._training.clip_budget.clear()
                raise RuntimeError(
                    f"Lomo: the graph does not show {hidden[0] if hidden else 'a parameter'}, which the loss uses, and "
                    "did not use in an earlier step with an equal loss (a layer inside the loss function, of which a "
                    "parameter was unfrozen?). No weight was changed. The next step runs the loss in every backward: "
                    "run this batch again"
                )
        return after_loss

    def norm_only_pass(self, engine: ParallelEngine | None) -> None:
        """A backward that sets the slots to zero, adds up norms in them, and keeps the graph for another backward."""
        state = self._training.state
        state.zero_slots()
        self.run_pass(NormPass(state.devices, scaled=self.scaled, engine=engine), retain_graph=True)

    def add_to_grads(self, kept: list[tuple[ManagedParameter, Tensor]]) -> None:
        """One backward that adds to ``.grad``, with the loss scale of the gradients `kept` that are there."""
        training, step, loss = self._training, self._step, self.graph.loss
        scale = training.accumulation.scale_for(loss, kept, training.state.scale)
        step.isolate([] if scale is None else self._unmanaged_leaves())
        step.adds_scaled = scale is not None
        step.enter(OptimizerBackward(training))
        run_backward(start_of(loss, scale), retain_graph=False)
        step.adds_scaled = False
        step.rejoin(scale, wanted=True)
        step.leave()

    def _unmanaged_leaves(self) -> list[Tensor]:
        """Leaves of the graph that may get a gradient and that no `Lomo` manages."""
        engine = self._training.engine
        return unmanaged_leaves([*self.graph.leaves, *(() if engine is None else engine.graph_leaves())])
