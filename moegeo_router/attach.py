"""``attach``: watch, regularize and step the routers of any MoE model while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .config import GeometryConfig
from .control.controller import Event
from .control.selection_bias import SelectionBiases
from .control.wiring import control_loop, guard_of
from .evaluation import Evaluation
from .integrations.versions import warn_of_untested
from .loggers.shares import log_shares
from .losses import Regularizers
from .metrics.summary import flatten, model_scalars
from .observe.build import checked_optimizers, refuse_second_watch, unwrapped
from .observe.forward import LayerForward
from .observe.statistics import RoutingStatistics, without_traces
from .observe.watch import Watch
from .optim import NaturalRules, RouterSteps
from .regularization import Regularization, RegularizerError, regularization_of, warn_of_own_loss
from .routers.find import RouterSite, find_routers
from .routers.tag import manifold_of
from .state import check_state

if TYPE_CHECKING:
    from .control.loop import ControlLoop
    from .loggers import Logger

FORMAT = 2


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: GeometryConfig | None = None,
) -> Geometry:
    """Watch the routers of ``model``, regularize them, and step them along their manifolds.

    Without an optimizer it only watches: sums over tokens are collected in the forward and backward passes that happen
    anyway, and nothing about the training changes, bit for bit. With one, the routers' step is taken over from it
    (``RouterSteps``), its weight decay is not applied to them, and the default regularizers are on (``Regularizers``).

    Not counted: eval mode, forwards under ``no_grad``, the recomputation of activation checkpointing, tokens that
    ``attention_mask`` masks, anything inside ``pause()``. A model that is compiled is attached to before its first
    call.

    Args:
        model: the model, or a data-parallel or compiled wrapper of it.
        optimizer: the optimizer, or several, that step the model (or accelerate's wrappers of them); the last one
            ends a step.
        config: see ``GeometryConfig``.

    Returns:
        ``loss()``, ``metrics()``, ``record(...)``, ``tokens(...)``, ``pause()``, ``detach()`` ….

    Raises:
        ValueError: no router found; ``top_k`` larger than a router's number of experts; a router on no manifold, in no
            optimizer, or frozen while regularizers are asked for; sharded routers; a model that is attached to, or an
            optimizer that is taken over already; experts that the estimator cannot see.

    Example:
        >>> mg.geometrize(model)
        >>> geometry = mg.attach(model, optimizer, mg.GeometryConfig(top_k=2))
        >>> for batch in data:
        ...     loss = model(batch) + geometry.loss()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     wandb.log(geometry.metrics())
        >>> geometry.detach()
    """
    optimizers = checked_optimizers(optimizer)
    if config is not None and not isinstance(config, GeometryConfig):
        raise ValueError(f"config must be a GeometryConfig, got {type(config).__name__}")
    return Geometry(model, optimizers, config or GeometryConfig())


class Geometry:
    """What ``attach`` returns; see there."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], config: GeometryConfig) -> None:
        self._model = model = unwrapped(model)
        if config.bias_speed and not optimizers:
            raise ValueError("bias_speed changes the model: without an optimizer attach only watches")
        if config.fisher == "minibatch" and not optimizers:
            raise ValueError("fisher='minibatch' reads gradients when the optimizer steps: give attach the optimizer")
        sites = find_routers(model, config.select) if config.hooks or (optimizers and config.step) else []
        self.config = config = config.for_routers(sites)
        if config.hooks:
            refuse_second_watch(sites)
        if sites and not any(manifold_of(site.weight) for site in sites):  # geometrize has said it else
            warn_of_untested(model, stacklevel=3)
        self._has_optimizer, self._attached, self._told_of_own_loss = bool(optimizers), True, False
        self._regularization = regularization_of(model, sites, config, trained=bool(optimizers))
        self._watch = Watch(
            model,
            sites,
            config,
            join=config.inject and (self._regularization.on or config.controller == "act"),
            sequences=self._regularization.weights.balance_scope == "sequence",
            on_begin=self._begin_forward,
            on_forward=self._observe,
            on_stop=self._stop_regularizing,
            strict=RegularizerError,
        )
        self._steps: RouterSteps | None = None
        self._biases: SelectionBiases | None = None
        self._control: ControlLoop | None = None
        # Before the steps are taken over: a gradient that is not finite must reach no one.
        self._guard = guard_of(optimizers, config)
        try:
            self._steps = self._take_over(sites, optimizers)
            if config.bias_speed:
                self._biases = SelectionBiases(model, sites, config.bias_speed)
            self._control = control_loop(
                model,
                sites,
                optimizers,
                config,
                steps=self._steps,
                regularization=self._regularization,
                paused=self.pause,
            )
        except BaseException:
            self.detach()  # what could not be attached leaves no hooks behind
            raise

    @property
    def _stepped(self) -> list[str]:
        """The routers in the order of the numbers that their natural steps report."""
        return [] if self._steps is None else self._steps.names

    @property
    def guarded(self) -> bool:
        """Whether a step with a gradient that is not finite is not taken."""
        return self._guard is not None and self._watch.watching

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that are watched, or were recorded."""
        return tuple(self._watch.window.experts)

    def loss(self, tokens: int | None = None) -> Tensor:
        """Return the regularizers of the newest forward pass, to be added to the loss before ``backward()``.

        Add it before the division by the number of micro-batches; with equal token counts its gradient is then that of
        the global batch, whatever their number and that of the ranks. With unequal ones, pass ``tokens``.

        Args:
            tokens: the unmasked tokens of all micro-batches of this step on this rank; the sum over the micro-batches
                is then not divided by their number.

        Returns:
            A scalar; 0 where none is on.

        Raises:
            RuntimeError: they are injected already, or the logits carry no gradient (reentrant checkpointing).
        """
        return self._regularization.loss(tokens)

    def record(
        self,
        layer: str,
        logits: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        x: Tensor | None = None,
        gates: Tensor | None = None,
        output: Tensor | None = None,
        domains: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        """Add one forward pass of a layer explicitly: for loops and models of one's own (``hooks=False``).

        What is missing disables what needs it: without ``ids`` (and ``top_k``) there are no load metrics, without
        ``gates`` and ``output`` no FHS by ``outputs``, without ``x`` no natural step. Pass tensors on their graph:
        regularizers and traces need it.

        Args:
            layer: its name; a new one is taken up.
            logits: (..., E) router logits.
            ids: (..., K) int64 chosen experts.
            mask: (...) bool, True where a token counts.
            x: (..., D) the router's input.
            gates: (..., K) weights of the chosen experts.
            output: (..., D) the block's output, the very tensor that it returns: a view or a copy that nothing is
                computed from gets no gradient (a warning says so).
            domains: (...) int64 domain of each token.
            sequences: (...) int64 sequence of each token.

        Raises:
            ValueError: shapes that do not fit, another number of experts than before, or a layer that is tapped.
        """
        if x is not None and self._steps is not None and not self._steps.takes(layer):
            names = ", ".join(self._steps.names)
            raise ValueError(f"x is what a router's natural step needs, and {layer!r} is none of them: {names}")
        self._watch.record(
            layer, logits, ids=ids, mask=mask, x=x, gates=gates, output=output, domains=domains, sequences=sequences
        )

    def record_loss(self, loss: Tensor) -> Tensor:
        """Tell the controller the loss of a micro-batch, and return it: without it no loss is watched or forecast.

        Args:
            loss: a scalar, the mean over the micro-batch's tokens; every rank and micro-batch counts alike.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss must be a scalar, got {tuple(loss.shape)}")
        if self._control is not None and self._attached and self._watch.watching:
            self._control.record_loss(loss)
        return loss

    def step(self, loss: Tensor | None = None) -> None:
        """End an optimizer step: for loops whose optimizer was not given, or has no step hooks. On every rank.

        Args:
            loss: see ``record_loss``.
        """
        if loss is not None:
            self.record_loss(loss)
        if not self._has_optimizer and self._attached:
            self._before_step()
            self._after_step()

    def limit_speed(self, limit: float | None, layers: Sequence[str] | None = None) -> None:
        """Set the speed limit of natural steps from here on: a schedule of one's own, or an emergency brake.

        Brakes of the controller multiply it.

        Args:
            limit: radians a step, before the factor of the learning-rate schedule; None: no limit.
            layers: whose; None: all that are stepped naturally.

        Raises:
            ValueError: a layer that is named and not stepped naturally, none that is, or a limit that is not above 0.
        """
        if self._steps is None:
            raise ValueError("no optimizer was given to attach, so there are no steps to limit")
        if layers is None and not self._steps.natural:
            raise ValueError("no router is stepped naturally, so there are no steps to limit")
        limits = dict.fromkeys(self._steps.natural if layers is None else layers, limit)
        self._steps.limit_speed(limits)
        if self._control is not None:
            self._control.limit_speed(limits)

    def metrics(self) -> dict[str, float]:
        """Return the scalars of the last optimizer step, ``geometry/fsi`` …

        Micro-batches add up, and with data parallelism every rank gets the same numbers. Without an optimizer the call
        itself ends a step: make it once a step, on every rank. On an accelerator the numbers are the newest that have
        arrived, a step late. Empty if nothing was seen.
        """
        self.step()
        newest = self._watch.window.newest(wait=not self._has_optimizer)
        if newest is None or not self._watch.watching:
            return {}
        (reduced, numbers), before = newest, self._watch.window.previous
        fresh = None if self._control is None else self._control.scalars
        scalars = self._scalars(reduced, before, numbers) if fresh is None else fresh
        own = {} if self._control is None else self._control.own.newest
        scalars = {name: found | own.get(name, {}) for name, found in scalars.items()}
        flat = flatten(scalars, self.config.per_layer, reduced.layers if self.config.per_expert else None)
        values = numbers["regularizers"]
        return flat | ({"geometry/regularizer": float(values.sum())} if scalars and len(values) else {})

    def events(self) -> list[Event]:
        """Return the controller's alerts, actions and outcomes since the last call (or ``log_control``)."""
        return [] if self._control is None else self._control.events()

    def log_control(self, logger: Logger, step: int) -> list[Event]:
        """Write the controller's readings and events since the last call, and return the events.

        Readings go to logs that are read back (JSON lines), from which ``python -m moegeo_router.replay`` comes to the
        same decisions; events everywhere.

        Args:
            logger: where to.
            step: the optimizer step.
        """
        return [] if self._control is None else self._control.log(logger, step)

    def log_pictures(self, logger: Logger, step: int) -> None:
        """Write a heatmap of the experts' load and histograms of their shares, every ``pictures_every`` steps.

        Nothing once the watching has stopped: what was seen last is not the routing of a later step.

        Args:
            logger: where to.
            step: the optimizer step.
        """
        if not self._watch.watching or not self.config.pictures_every or step % self.config.pictures_every:
            return
        if (newest := self._watch.window.newest(wait=False)) is not None:
            log_shares(logger, newest[0], self.layers, step)

    @contextmanager
    def evaluation(self) -> Iterator[Evaluation]:
        """Measure the routing of the forward passes inside, which train nothing: held-out data.

        They count whatever the mode of the model, without gradients, and for nothing else. With data parallelism all
        ranks must come here, and leave, together.

        Example:
            >>> with geometry.evaluation() as held_out:
            ...     for batch in valid:
            ...         model(batch)
            >>> held_out.metrics()
        """
        found = Evaluation(self.config.per_layer, self.config.per_expert)
        with self._watch.evaluation() as window:
            yield found
        found.end(window.close(failed=not self._watch.watching).to_host(), window.order)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside: for probes, generation, anything that is not training."""
        with self._watch.pause():
            yield

    @contextmanager
    def tokens(
        self, mask: Tensor | None = None, *, segments: Tensor | None = None, domains: Tensor | None = None
    ) -> Iterator[None]:
        """Say what the tokens of the forward passes inside are, for models that are not called with such arguments.

        Args:
            mask: (B, L), or (B,) for whole sequences; True (or more than 0) where a token counts.
            segments: (B, L) packed sequence of each token, 0 for padding.
            domains: (B, L) or (B,) domain of each token, in 0..num_domains - 1.

        Raises:
            ValueError: domains, and no ``num_domains`` in the configuration.
        """
        with self._watch.tokens(mask=mask, segments=segments, domains=domains):
            yield

    def detach(self) -> None:
        """Take every hook off and give the step back; the model is as it was. ``metrics()`` keeps the last step's."""
        self._watch.unhook()
        self._attached = False
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
        if self._guard is not None:
            self._guard.remove()
        if self._control is not None:
            self._control.remove()
        self._stop_regularizing()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, between two optimizer steps: plain tensors and numbers."""
        return {
            "format": FORMAT,
            **self._watch.window.state(),
            "sensitivities": {n: c.cpu() for n, c in self._regularization.sensitivities().items()},
            "references": self._regularization.references(),
            "routers": {} if self._steps is None else self._steps.state_dict(),
            "control": None if self._control is None else self._control.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: the state of another format, other layers or other routers.
        """
        check_state(state, FORMAT)
        window, experts = self._watch.window, state["experts"]
        if self.config.hooks and experts and experts != window.experts:
            raise ValueError(f"geometry's state is of layers {experts}, this model has {window.experts}")
        if self._steps is not None:
            self._steps.load_state_dict(state["routers"])
        elif state["routers"]:
            raise ValueError("geometry's state holds the routers' steps: give attach the optimizer")
        # A state from before there was a controller has none of it.
        if self._control is not None and state.get("control") is not None:
            self._control.load(state["control"])
        if (reduced := window.restored(state)) is not None:
            values = self._regularization.restore(reduced, state["sensitivities"], state.get("references"))
            window.post(reduced, {**state.get("numbers", {}), "regularizers": values})

    def _take_over(self, sites: Sequence[RouterSite], optimizers: Sequence[Optimizer]) -> RouterSteps | None:
        if not optimizers:
            return None
        config = self.config
        natural = (
            NaturalRules(config.natural, config.routing.scores, config.group) if config.step == "natural" else None
        )
        return RouterSteps(
            sites if config.step is not None else [],
            optimizers,
            natural=natural,
            scale=self.config.router_lr,
            before=self._before_step,
            after=self._after_step,
        )

    def _observe(self, seen: LayerForward, trained: bool) -> None:
        self._regularization.observe(seen, trained)
        if self._steps is not None:
            self._steps.observe(seen)
        if self._control is not None:
            self._control.observe(seen)

    def _begin_forward(self, arguments: Mapping[str, Any]) -> None:
        self._regularization.begin_forward()
        if self._regularization.on and not self._told_of_own_loss and "output_router_logits" in arguments:
            self._told_of_own_loss = warn_of_own_loss(self._model, arguments)

    def _before_step(self) -> None:
        if self._watch.watching:
            self._regularization.check(self._watch.window.layers, self._watch.never_seen)
            with self._watch.guarded("the gradients"):
                self._watch.before_step(stepped=self._has_optimizer)

    def _after_step(self) -> None:
        with self._watch.guarded("the sums of a step"):
            skipped = self._guard is not None and self._guard.take()
            reduced = self._watch.close()
            if reduced is not None:
                movement = None if self._steps is None else self._steps.movement
                numbers: dict[str, Tensor] = {} if movement is None else movement._asdict()
                if self._control is not None:
                    reduced = without_traces(reduced) if skipped else reduced
                    numbers |= self._control.end_step(self._watch.window, reduced, numbers, skipped, self._scalars)
                # After the controller, which may have changed what they weigh.
                numbers["regularizers"] = self._regularization.end_step(reduced)
                if self._biases is not None and not (skipped or (self._steps is not None and self._steps.skipped)):
                    self._biases.update(reduced)
                self._watch.window.post(reduced, numbers)
        # Only now, when every rank has learnt of it: a natural step is one of all ranks together.
        if self._watch.stopped and self._steps is not None:
            self._steps.leave_natural_steps()

    def _scalars(
        self, reduced: RoutingStatistics, before: RoutingStatistics | None, numbers: Mapping[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        return model_scalars(self.layers, reduced, before, self._stepped, numbers)

    def _stop_regularizing(self) -> str:
        lost = ", its regularizers are off" if self._regularization.on else ""
        # Nobody sees the tokens any more that natural steps need.
        lost += ", selection biases rest" if self._biases is not None else ""
        lost += ", Riemannian Adam steps the routers" if self._steps is not None and self._steps.natural else ""
        self._regularization = Regularization(Regularizers.none(), False, self.config)
        return lost
