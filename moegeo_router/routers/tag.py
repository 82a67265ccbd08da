"""The tag: a parameter becomes a ``geoopt.ManifoldParameter`` in place, and a plain parameter again.

Only the class and one attribute change. Identity, value, dtype, ``requires_grad``, ties and the references that
optimizers hold stay as they are; a re-parameterisation would keep none of these.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def manifold_of(parameter: Tensor) -> nn.Module | None:
    """Return the router manifold ``parameter`` was put on by this library, or None."""
    from ..geometry.rows import RouterManifold

    manifold = getattr(parameter, "manifold", None)
    return manifold if isinstance(manifold, RouterManifold) else None  # type: ignore[return-value]


def changes_function(name: str) -> bool:
    """Whether a weight must change to fit the manifold called ``name``."""
    return name in ("sphere", "orthonormal")


@torch.no_grad()
def put_on_manifold(parameter: Tensor, name: str, *, seed: int = 0, allow_change: bool = False) -> None:
    """Turn ``parameter`` (E, D) in place into a point on the manifold called ``name``.

    Args:
        parameter: the weight; its values change only if the manifold requires it.
        name: ``"polar"``, ``"sphere"``, ``"orthonormal"`` or ``"euclidean"``.
        seed: for the directions of zero rows (polar).
        allow_change: whether values may change.

    Raises:
        ValueError: unknown manifold, a shape it cannot hold, a parameter that is on another manifold, or values that
            would change without ``allow_change``.
    """
    from ..geometry.rows import router_manifold

    manifold = router_manifold(name, seed)
    current = getattr(parameter, "manifold", None)
    if current is not None and type(current) is not type(manifold):
        raise ValueError(f"the weight is on {current.name} already: export it before putting it on {manifold.name}")
    if current is not None:
        return
    ok, reason = manifold.check_point(parameter, explain=True)
    if not ok:
        raise ValueError(f"a weight {tuple(parameter.shape)} does not fit manifold={name!r}: {reason}")
    if changes_function(name):
        if not allow_change:
            raise ValueError(f"{name} rows change the function of a given weight: pass allow_change=True")
        parameter.copy_(manifold.projx(parameter))
    _tag(parameter, manifold)


def restore_tag(parameter: Tensor, name: str, *, seed: int = 0) -> None:
    """Tag ``parameter`` again, whose values are on the manifold called ``name`` already; nothing if it is tagged.

    ``to_empty`` and ``load_state_dict(assign=True)`` put a new, plain parameter in the place of the tagged one.
    """
    from ..geometry.rows import router_manifold

    if getattr(parameter, "manifold", None) is None:
        _tag(parameter, router_manifold(name, seed))


def _tag(parameter: Tensor, manifold: nn.Module) -> None:
    from geoopt import ManifoldParameter

    parameter.__class__ = ManifoldParameter
    parameter.manifold = manifold  # type: ignore[attr-defined]


def count_zero_rows(weight: Tensor) -> int:
    """Return how many rows of ``weight`` (E, D) are zero, and so have no direction."""
    return int((weight.detach() == 0).all(dim=-1).sum())


def refuse_zero_rows(weight: Tensor, name: str) -> None:
    """Raise a ValueError if a row of ``weight`` (E, D) is zero: it has no direction, so no place on the sphere."""
    zero_rows = count_zero_rows(weight)
    if zero_rows:
        raise ValueError(f"{name}: {zero_rows} of {len(weight)} rows are zero and have no direction on the sphere")


def take_off_manifold(parameter: Tensor) -> None:
    """Turn a parameter that this library put on a manifold back into a plain ``nn.Parameter``, in place."""
    if manifold_of(parameter) is not None:
        parameter.__class__ = nn.Parameter
        del parameter.manifold  # type: ignore[attr-defined]
