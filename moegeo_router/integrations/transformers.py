"""transformers: stacked experts whose products can be watched.

transformers 5 computes the experts of most families (classes under its ``use_experts_implementation``) by a function
that the model's config names. While experts are watched it names ours, which computes what the others compute and
calls the module's ``fisher_tap`` after every product of rows with the experts' weights.

Shape legend: T tokens, E experts, K chosen experts of a token, N = T·K (token, expert) pairs sorted by expert, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..observe.fisher import ProductTap, put_tap

#: The name of our function in the registry of experts functions.
NAME = "moegeo_router"

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def observe_experts(module: Any, tap: ProductTap) -> Callable[[], None] | None:
    """Have a transformers module with stacked experts call ``tap`` after every product with its weights.

    In training its config then names our experts function: one grouped product over all experts where the model took
    that (the same training, bit for bit), else one expert after the other (the same up to rounding). In eval mode, and
    for other modules that share the config, everything runs as before, and so does a copy or a pickle of the model.

    Args:
        module: the stacked experts.
        tap: see ``ProductTap``.

    Returns:
        What puts back exactly what was there; None if the module's class is not under ``use_experts_implementation``.

    Raises:
        ValueError: experts with a norm of their own, quantised, sharded or expert-parallel ones, or watched ones.
    """
    # A class of transformers comes with its module of experts functions: nothing is imported for others.
    functions = sys.modules.get("transformers.integrations.moe")
    original = getattr(type(module).forward, "__wrapped__", None)
    if functions is None or original is None or not all(hasattr(module, flag) for flag in _FLAGS):
        return None
    _refuse(module)
    registry, config = functions.ALL_EXPERTS_FUNCTIONS, module.config
    untap = put_tap(module, tap)
    function = registry.setdefault(NAME, _ObservedExperts(registry))
    if not isinstance(config._experts_implementation, _Name):
        # Not by the property, which would also overwrite what the config's sub-configs say.
        config._experts_implementation_internal = _Name.instead(config._experts_implementation)
    name = config._experts_implementation
    name.users += 1
    function.users += 1

    def undo() -> None:
        untap()
        name.users -= 1
        function.users -= 1
        if not name.users and config._experts_implementation is name:
            config._experts_implementation_internal = name.replaced
        if not function.users:
            registry.pop(NAME, None)

    return undo


class _Name(str):
    """Our name in a config; whoever copies or pickles the config gets the name that it replaces.

    Attributes:
        replaced: the experts implementation that the config named before.
        users: watched modules that have this config.
    """

    replaced: str | None
    users: int

    @classmethod
    def instead(cls, replaced: str | None) -> _Name:
        """Return our name in the place of another."""
        name = cls(NAME)
        name.replaced, name.users = replaced, 0
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.replaced

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ()) if self.replaced is None else (str, (self.replaced,))


class _ObservedExperts:
    """The experts function that is registered, called as ``function(module, hidden_states, ids, gates)``.

    Args:
        registry: where it is registered, and the functions that it replaces are.
    """

    def __init__(self, registry: Any) -> None:
        self._registry, self.users = registry, 0

    def __call__(self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (T, D): the gated sum over the chosen experts of each token.

        Args:
            module: the stacked experts.
            hidden_states: (T, D).
            top_k_index: (T, K) chosen experts, in [0, E).
            top_k_weights: (T, K) their gates.
        """
        replaced = module.config._experts_implementation.replaced
        tap = getattr(module, "fisher_tap", None)
        if tap is None or not module.training or module._is_expert_parallel:
            before = self._registry.get_interface(replaced, type(module).forward.__wrapped__)
            return before(module, hidden_states, top_k_index, top_k_weights)
        grouped = replaced == "grouped_mm" and _grouped_mm_takes(module.down_proj)
        return _experts(module, tap, hidden_states, top_k_index, top_k_weights, grouped)


@torch.compiler.disable  # the compiler takes no grouped product of fp32
def _experts(module: Any, tap: ProductTap, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, grouped: bool) -> Tensor:
    expert_N, order_N = ids_TK.reshape(-1).sort()
    maps = _Maps(module, tap, expert_N, grouped)
    h_NF = maps(x_TD[order_N // ids_TK.shape[1]], "gate_up_proj" if module.has_gate else "up_proj")
    h_NF = module._apply_gate(h_NF) if module.has_gate else module.act_fn(h_NF)
    weighted_ND = maps(h_NF, "down_proj") * gates_TK.reshape(-1)[order_N].unsqueeze(-1)
    # Back to the order of the tokens, and summed there: no atomic additions, and no rounding between them.
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return weighted_ND[place_N].view(*ids_TK.shape, -1).sum(dim=1).to(x_TD.dtype)


class _Maps:
    """The linear maps of all experts, applied to rows sorted by expert.

    Args:
        module: the stacked experts.
        tap: called after every product.
        expert_N: the expert of each row, ascending.
        grouped: in one product (``grouped_mm``), which never reads back to the host; else one expert after the other.
    """

    def __init__(self, module: Any, tap: ProductTap, expert_N: Tensor, grouped: bool) -> None:
        self._module, self._tap, self._expert_N, self._grouped = module, tap, expert_N, grouped
        self._counts_E = torch.bincount(expert_N, minlength=module.num_experts)

    def __call__(self, x_ND: Tensor, name: str) -> Tensor:
        """Return the products (N, F) of the rows (N, D) with the weights called ``name``, the biases added."""
        weight = getattr(self._module, name)
        weight_EDF = weight if self._module.is_transposed else weight.transpose(-2, -1)
        if self._grouped:
            ends_E = self._counts_E.cumsum(0, dtype=torch.int32)
            y_NF = F.grouped_mm(x_ND.to(weight.dtype), weight_EDF, offs=ends_E)
        else:
            # unbind, not indexing: the backward of w[e] writes a whole (E, D, F) gradient for every expert.
            each = zip(x_ND.split(self._counts_E.tolist()), weight_EDF.unbind(), strict=True)
            y_NF = torch.cat([x @ w for x, w in each])
        if self._module.has_bias:
            y_NF.add_(getattr(self._module, f"{name}_bias")[self._expert_N])
        self._tap(x_ND, y_NF, self._expert_N, bias=self._module.has_bias)
        return y_NF


def _grouped_mm_takes(weight: Tensor) -> bool:
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _refuse(module: Any) -> None:
    """Raise a ValueError that says why the experts cannot be watched, if they cannot."""
    if module.has_post_expert_norm:
        raise ValueError("they have a norm of their own")
    if module._is_expert_parallel:
        raise ValueError("they are expert-parallel")
    names = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    names |= {f"{name}_bias" for name in names} if module.has_bias else set()
    parameters = dict(module.named_parameters())
    if parameters.keys() != names:
        raise ValueError(f"their parameters are {', '.join(parameters)}, not {', '.join(sorted(names))}")
    for name, parameter in parameters.items():
        if type(parameter.data) is not Tensor or parameter.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is a quantised or sharded weight ({type(parameter.data).__name__}, {parameter.dtype})"
            )
