"""``geometrize`` and ``export``: a model's routers onto manifolds and back, in place."""

from __future__ import annotations

import warnings
import zlib
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..integrations.versions import warn_of_untested
from .experts import refuse_sharded
from .find import RouterSite, Select, find_routers
from .router import GeometricRouter
from .tag import (
    changes_function,
    count_zero_rows,
    manifold_of,
    put_on_manifold,
    refuse_zero_rows,
    restore_tag,
    take_off_manifold,
)

if TYPE_CHECKING:
    from ..geometry.rows import ManifoldName


def geometrize(
    model: nn.Module,
    manifold: ManifoldName = "polar",
    *,
    select: Select = None,
    allow_change: bool = False,
) -> list[RouterSite]:
    """Turn every router's weight of ``model`` into a manifold parameter, in place.

    With ``"polar"`` and ``"euclidean"`` nothing else changes: the same tensor, the same function bit for bit, the same
    state-dict keys, module classes, ties and optimizer references. Rows that are zero keep the function too; they get
    a small random direction, drawn from the router's name, at their first polar step (a warning says so).
    ``"orthonormal"`` changes the values, ``"sphere"`` (the cosine router; ``nn.Linear`` routers only) also the forward:
    both need ``allow_change=True``. The cosine router has one more parameter, ``temperature_logit``: convert before the
    optimizer is made.

    ``to_empty`` and ``load_state_dict(assign=True)`` replace parameters and so lose the geometry of a router that is
    not a ``GeometricRouter``: call ``geometrize`` again after them.

    Args:
        model: any module with routers.
        manifold: ``"polar"``, ``"euclidean"``, ``"orthonormal"`` or ``"sphere"``.
        select: which routers, see ``find_routers``; by default those its rules find.
        allow_change: accept a conversion that changes the function.

    Returns:
        The routers, in the order of the model's modules.

    Raises:
        ValueError: no router found, a sharded model, or the manifold cannot hold one of the routers; then none has been
            changed.
    """
    sites = find_routers(model, select)
    geometrize_sites(model, sites, manifold, allow_change=allow_change)
    return sites


def geometrize_sites(
    model: nn.Module, sites: list[RouterSite], manifold: ManifoldName, *, allow_change: bool = False
) -> None:
    """Do what ``geometrize`` does with routers of ``model`` that were found already."""
    refuse_sharded(model, sites)
    _check_convertible(sites, manifold, allow_change)
    if not any(manifold_of(site.weight) for site in sites):
        warn_of_untested(model, stacklevel=3)
    temperatures: dict[Tensor, nn.Parameter] = {}  # routers that share a weight share its temperature
    for site in sites:
        if manifold == "sphere" and type(site.module) is nn.Linear:
            _make_cosine(site.module, temperatures)
        seed = zlib.crc32(site.name.encode())
        if isinstance(site.module, GeometricRouter):
            restore_tag(site.weight, manifold, seed=seed)
        else:
            put_on_manifold(site.weight, manifold, seed=seed, allow_change=allow_change)
        if manifold == "polar":
            _warn_of_zero_rows(site)


def export(model: nn.Module, *, allow_change: bool = False) -> nn.Module:
    """Take every router of ``model`` off its manifold, in place: plain parameters, stock ``nn.Linear`` classes.

    Undoes ``geometrize`` and replaces ``GeometricRouter`` modules by what they compute; a prior in the logits becomes
    part of the bias. Manifold parameters that this library did not make are left alone. A model without routers of ours
    is returned as it is.

    Args:
        model: any module.
        allow_change: also export cosine routers, whose input normalisation ``nn.Linear`` does not have; the function is
            then the same only for inputs of norm √D. Also give routers a bias that have a prior and none to keep it in.

    Returns:
        ``model``.

    Raises:
        ValueError: a cosine router, or a prior and no bias, without ``allow_change``; routers with one bias and
            different priors; a subclass of ``GeometricRouter`` with a forward of its own; then nothing has been
            changed.
    """
    routers = [(name, m) for name, m in model.named_modules() if isinstance(m, GeometricRouter)]
    for name, router in routers:
        if type(router).forward is not GeometricRouter.forward:
            raise ValueError(
                f"router {name}: {type(router).__name__} has a forward of its own that nn.Linear would lose"
            )
    cosine = [name for name, m in routers if m.manifold == "sphere"]
    if cosine and not allow_change:
        raise ValueError(
            f"routers {', '.join(cosine)} normalise their input, nn.Linear does not: pass allow_change=True"
        )
    _check_priors(routers, allow_change)
    folded: set[Tensor] = set()
    for _, router in routers:
        _make_linear(router, folded)
    for parameter in model.parameters():
        take_off_manifold(parameter)
    return model


def _check_convertible(sites: list[RouterSite], manifold: str, allow_change: bool) -> None:
    """Raise before anything is changed."""
    from ..geometry.rows import router_manifold

    target = router_manifold(manifold)
    for site in sites:
        ok, reason = target.check_point(site.weight, explain=True)
        if not ok:
            raise ValueError(f"router {site.name}: {reason}")
        if not bool(site.weight.isfinite().all()):
            raise ValueError(f"router {site.name}: the weight holds NaN or inf")
        current = getattr(site.weight, "manifold", None)
        own = site.module.manifold if isinstance(site.module, GeometricRouter) else manifold
        if (current is not None and type(current) is not type(target)) or own != manifold:
            on = own if current is None else current.name
            raise ValueError(f"router {site.name} is on {on} already: export(model) first")
        already = current is not None or isinstance(site.module, GeometricRouter)
        if changes_function(manifold) and not already and not allow_change:
            raise ValueError(f"{manifold} rows change the function of router {site.name}: pass allow_change=True")
        if manifold == "sphere" and not already and site.adapter is not None:
            raise ValueError(f"router {site.name} has an adapter (LoRA): it cannot become a cosine router")
        if manifold == "sphere" and not already and type(site.module) is not nn.Linear:
            raise ValueError(
                f"router {site.name} is a {type(site.module).__name__}: "
                "only nn.Linear routers can become cosine routers"
            )
        if manifold == "sphere":
            refuse_zero_rows(site.weight, f"router {site.name}")


def _check_priors(routers: list[tuple[str, GeometricRouter]], allow_change: bool) -> None:
    priors: dict[Tensor, object] = {}
    for name, router in routers:
        try:
            router.prior_shift(allow_change)
        except ValueError as error:
            raise ValueError(f"router {name}: {error}") from None
        if router.bias is not None and priors.setdefault(router.bias, router.prior) is not router.prior:
            raise ValueError(f"router {name} shares its bias with a router of another prior: it cannot keep both")


def _warn_of_zero_rows(site: RouterSite) -> None:
    zero_rows = count_zero_rows(site.weight)
    if zero_rows:
        warnings.warn(
            f"router {site.name}: {zero_rows} of {site.num_experts} rows are zero; a zero row has no direction, "
            "so each gets a small random one at its first step",
            stacklevel=4,
        )


def _make_cosine(linear: nn.Module, temperatures: dict[Tensor, nn.Parameter]) -> None:
    """Turn an ``nn.Linear`` in place into a cosine ``GeometricRouter``; its own weight tensor stays."""
    assert isinstance(linear, nn.Linear)
    if linear.weight not in temperatures:
        cosine = GeometricRouter.from_linear(linear, manifold="sphere", allow_change=True)
        temperatures[linear.weight] = cosine.temperature_logit
    linear.__class__ = GeometricRouter
    object.__setattr__(linear, "manifold", "sphere")
    linear.temperature_logit = temperatures[linear.weight]
    put_on_manifold(linear.weight, "sphere", allow_change=True)


def _make_linear(router: GeometricRouter, folded: set[Tensor]) -> None:
    """Turn a ``GeometricRouter`` in place into the ``nn.Linear`` it equals; its own weight tensor stays."""
    if router.manifold == "sphere":
        if router.weight not in folded:
            router.weight.data.copy_(router.to_linear(allow_change=True).weight)
            folded.add(router.weight)
        del router.temperature_logit
    _fold_prior(router, folded)
    take_off_manifold(router.weight)
    del router.__dict__["manifold"]
    router.__class__ = nn.Linear  # type: ignore[assignment]


def _fold_prior(router: GeometricRouter, folded: set[Tensor]) -> None:
    shift = router.prior_shift(allow_change=True)
    if shift is not None and router.bias is None:
        router.bias = nn.Parameter(shift.to(router.weight.dtype))
    elif shift is not None and router.bias not in folded:
        bias: Tensor = router.bias
        bias.data.add_(shift)
        folded.add(bias)
    router._modules.pop("prior", None)
