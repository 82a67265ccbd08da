"""What ``attach`` does: frozen dataclasses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from .checks import check_choice, check_not_negative, check_whole
from .control.config import ControlConfig, Mode
from .control.own_signals import Signal, with_rows
from .losses import Regularizers
from .observe.fisher import Estimator, LossScale
from .routers.family import GatesScale, Routing, common_routing
from .routers.find import RouterSite, Select
from .routers.gating import ScoreFunction

Step = Literal["riemannian", "natural"]
OnError = Literal["warn", "raise"]


@dataclass(frozen=True, kw_only=True)
class NaturalConfig:
    """How a natural step is made; every number can differ from one parameter group to another.

    Attributes:
        limit: r, radians: a step is shortened until the exact mean KL divergence of the routing before it from that
            after it, on the kept rows, is at most r²/2. The routing then moves by about r (RMS over tokens). None: no
            limit.
        limit_follows_lr: r shrinks with the learning rate of the group: times its ratio to its peak. The peak is the
            largest of the rate that the group had when its step was taken over (``attach``, or when
            ``NaturalGradient`` was made), those that it had since, and its ``initial_lr`` and ``max_lr``, which
            schedulers of torch leave there.
        momentum: of the natural gradients, a tangent vector that is carried along; bias-corrected.
        second_moment: of their squared lengths in the Fisher metric. The momentum is divided by the root, so that its
            length says how far the gradients agree: a step has length ``lr · limit`` where they do, less where they are
            noise. 0: none, the plain natural gradient times ``lr``.
        damping: λ of either Kronecker factor, as a share of its mean eigenvalue.
        floor: part of λ_G that does not vanish with G, as a share of G's mean eigenvalue at uniform routing.
        decay: of the factors' averages, a step.
        refresh_every: the factors' inverses are computed anew every so many steps (and at steps 1, 2, 4 … before).
        rows: the most tokens kept of a step and router, over all ranks; factors and limit come from them.
        block: the most columns of a block of A; a wider router has equal diagonal blocks, 1 is the diagonal.

    Raises:
        ValueError: a value out of range.
    """

    limit: float | None = 0.015
    limit_follows_lr: bool = True
    momentum: float = 0.9
    second_moment: float = 0.0
    damping: float = 1.0
    floor: float = 1e-3
    decay: float = 0.95
    refresh_every: int = 20
    rows: int = 512
    block: int = 1024

    def __post_init__(self) -> None:
        for name in ("momentum", "second_moment", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"natural.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("damping", "floor"):
            check_not_negative(f"natural.{name}", getattr(self, name))
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"natural.limit must be above 0 (radians) or None, got {self.limit}")
        for name in ("refresh_every", "rows", "block"):
            check_whole(f"natural.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class GeometryConfig:
    """What ``attach`` watches, regularizes and steps.

    Attributes:
        select: which routers, see ``find_routers``; by default those its rules find.
        hooks: tap the model's forward passes. False: only what ``record`` is given, for loops of one's own.
        scores: the routers' score function, which makes p of their logits. None, here and below: what is known of
            their family (``RouterFamily``), for others softmax.
        top_k: experts chosen per token, for layers that show logits only: their choices are then taken to be the k
            largest logits, which nothing can check: a layer that chooses otherwise (selection bias, groups, capacity)
            returns its choices from a class called ``*Router*``, or records them. Without it such layers have no load
            metrics, but for families that say it.
        renormalize: for the same layers, whether the gates of a token's chosen experts sum to 1; by default they do.
        fisher: estimator of the experts' Fisher traces, from which FHS comes: ``"outputs"`` (any block),
            ``"parameters"`` (exact, linear experts), ``"minibatch"`` (needs an optimizer), or None.
        loss: whether the training loss is a ``"mean"`` over a forward's tokens or a ``"sum"`` over a total that all
            micro-batches and ranks share: it decides how the traces of unequal micro-batches add up.
        gates: what the gates multiply, the experts' ``"output"`` (the default) or their ``"input"`` (Llama 4).
        num_domains: D, for ``fsi_domain``; domains arrive by ``tokens(domains=...)`` or ``record(domains=...)``.
        regularizers: which are on. None: with an optimizer the defaults of ``Regularizers``, without one none.
        inject: the regularizers ride on the graph: their gradient joins that of the router's logits, and the loss of
            the user is left alone. Otherwise they come from ``loss()``.
        accumulation: injected gradients are divided by this: the number of micro-batches whose losses the user divides
            by it, or a function that returns that of the step under way, where not all have as many. (``loss()`` needs
            no such number: it is divided with the rest.)
        grad_scaler: the ``torch.amp.GradScaler`` of the run: injected gradients must be scaled like others, and Fisher
            traces of a step that it skips have another scale than those of the next.
        step: how the routers are stepped when there is an optimizer, whose step is then taken over: ``"natural"``
            (natural gradients within a speed limit; Riemannian Adam for routers that do not show what these need) or
            ``"riemannian"`` (Riemannian Adam); None leaves it there.
        router_lr: factor on the routers' learning rate: that of their group (``"riemannian"``), or the ratio of that
            to its peak (``"natural"``; what counts as the peak: ``NaturalConfig.limit_follows_lr``).
        natural: how natural steps are made.
        bias_speed: u of loss-free balancing, ``b ← b + u · sign(mean n - n)`` once a step, for the biases that routers
            like DeepSeek-V3's have for choosing experts only, and that nobody else updates; 0.001 is usual. 0: they are
            left alone.
        controller: ``"observe"``: alerts when a metric of the table goes wrong; ``"advise"``: also what it would do
            about it; ``"act"``: and does it. None: no controller. It never changes which step the routers have.
        control: thresholds, set-points, ladders and budgets of the controller.
        signals: of one's own (``Signal``): further metrics that the controller watches.
        interventions: of one's own (``Intervention``), for the ladders.
        per_layer: ``metrics()`` also has every layer's scalars.
        per_expert: ``metrics()`` also has the load share, the share of the traces and p̄ of every expert.
        pictures_every: ``log_pictures`` writes at every so many steps; 0: never.
        on_error: ``"warn"``: an error while watching switches the watching off, once, on all ranks together, with the
            reason, and never stops a run; ``"raise"``.
        group: the data-parallel process group; None is the default group, if there is one.

    Raises:
        ValueError: a value out of range, or options that exclude each other.
    """

    select: Select = None
    hooks: bool = True
    scores: ScoreFunction | None = None
    top_k: int | None = None
    renormalize: bool | None = None
    fisher: Estimator | None = "outputs"
    loss: LossScale = "mean"
    gates: GatesScale | None = None
    num_domains: int = 0
    regularizers: Regularizers | None = None
    inject: bool = False
    accumulation: int | Callable[[], int] = 1
    grad_scaler: Any = None
    step: Step | None = "natural"
    router_lr: float = 1.0
    natural: NaturalConfig = field(default_factory=NaturalConfig)
    bias_speed: float = 0.0
    controller: Mode | None = "observe"
    control: ControlConfig = field(default_factory=ControlConfig)
    signals: tuple[Signal, ...] = ()
    interventions: tuple[Any, ...] = ()
    per_layer: bool = False
    per_expert: bool = False
    pictures_every: int = 0
    on_error: OnError = "warn"
    group: Any = None

    def __post_init__(self) -> None:
        check_choice("scores", self.scores, (*get_args(ScoreFunction), None))
        check_choice("fisher", self.fisher, (*get_args(Estimator), None))
        check_choice("loss", self.loss, get_args(LossScale))
        check_choice("gates", self.gates, (*get_args(GatesScale), None))
        check_choice("step", self.step, (*get_args(Step), None))
        check_choice("on_error", self.on_error, get_args(OnError))
        check_choice("controller", self.controller, (*get_args(Mode), None))
        unknown = {"top_k"} if self.top_k is None else set()
        unknown |= {"accumulation"} if callable(self.accumulation) else set()
        for name, least in (("top_k", 1), ("num_domains", 0), ("accumulation", 1), ("pictures_every", 0)):
            if name not in unknown:
                check_whole(name, getattr(self, name), least)
        if not 0 <= self.router_lr < float("inf"):
            raise ValueError(f"router_lr must be a factor of at least 0, got {self.router_lr}")
        check_not_negative("bias_speed", self.bias_speed)
        if self.regularizers is not None and not isinstance(self.regularizers, Regularizers):
            raise ValueError(f"regularizers must be a Regularizers(...) or None, got {self.regularizers!r:.80}")
        if not isinstance(self.natural, NaturalConfig):
            raise ValueError(f"natural must be a NaturalConfig(...), got {self.natural!r:.80}")
        if not isinstance(self.control, ControlConfig):
            raise ValueError(f"control must be a ControlConfig(...), got {self.control!r:.80}")
        with_rows(self.control, self.signals).table()
        if self.signals and self.controller is None:
            raise ValueError("signals are for the controller: take another one than controller=None")
        if not self.inject and (callable(self.accumulation) or self.accumulation > 1):
            raise ValueError("accumulation is for injected gradients (inject=True): loss() is divided with your loss")
        if self.regularizers is not None and self.regularizers.fhs and self.fisher != "outputs":
            raise ValueError(f"regularizers.fhs needs fisher='outputs', got {self.fisher!r}")
        if self.grad_scaler is not None and not callable(getattr(self.grad_scaler, "scale", None)):
            raise ValueError(f"grad_scaler must be a torch.amp.GradScaler, got {type(self.grad_scaler).__name__}")

    @cached_property
    def routing(self) -> Routing:
        """How the routers route, by this configuration alone."""
        return self._said(Routing())

    def for_routers(self, sites: Sequence[RouterSite]) -> GeometryConfig:
        """Return the configuration with what it leaves open filled in from the families of the routers.

        Raises:
            ValueError: the routers differ in something that is left open.
        """
        routing = common_routing([(site.name, self._said(site.routing)) for site in sites] or [("", self.routing)])
        return replace(self, **routing._asdict())

    def _said(self, known: Routing) -> Routing:
        own = {name: getattr(self, name) for name in Routing._fields}
        return known._replace(**{name: value for name, value in own.items() if value is not None})

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of the step under way, which injected gradients are divided by."""
        return self.accumulation() if callable(self.accumulation) else self.accumulation
