"""SwiGLU experts with stacked weights, and four ways of computing the same thing.

Shape suffixes: T tokens, E experts, K chosen experts of a token, N = T·K (token, expert) pairs sorted by expert,
C rows an expert is padded to, D width, F hidden width of one expert.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stacks(NamedTuple):
    """The weights of E experts: ``gate`` (E, D, F), ``up`` (E, D, F), ``down`` (E, F, D); of one, without E."""

    gate: Tensor
    up: Tensor
    down: Tensor


ExpertFunction = Callable[..., Tensor]
"""(x_TD, weights_TK, ids_TK, stacks, tap=None) -> y_TD"""

Product = Callable[[Tensor, Tensor], Tensor]
"""(rows (..., n, D), weights (..., D, F)) -> (..., n, F)"""

Tap = Callable[[Tensor, Tensor, int | Tensor], None]
"""(rows (..., D), their products (..., F), the expert of each row: a number, or integers broadcast against the rows)"""


def swiglu(x: Tensor, stacks: Stacks, product: Product = torch.matmul) -> Tensor:
    """One expert, ``(silu(x gate) ⊙ (x up)) down``; leading dimensions are batched as in torch.matmul.

    Args:
        x: (..., n, D) rows.
        stacks: the expert's weights, or those of as many experts as there are batches of rows.
        product: how rows meet weights.

    Returns:
        (..., n, D).
    """
    return product(F.silu(product(x, stacks.gate)) * product(x, stacks.up), stacks.down)


def loop(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, stacks: Stacks, tap: Tap | None = None) -> Tensor:
    """The definition, ``y_t = Σ_k weights_tk · expert_{ids_tk}(x_t)``, one expert after the other.

    Args:
        x_TD: tokens.
        weights_TK: gates, float32.
        ids_TK: int64 chosen experts, in [0, E).
        stacks: the experts' weights.
        tap: called after every product with weights of the experts.

    Returns:
        y_TD in x's dtype, summed in float32 (float64 for float64 tokens).
    """
    y_TD = torch.zeros(x_TD.shape, dtype=_sum_dtype(x_TD), device=x_TD.device)
    for expert in range(len(stacks.gate)):
        rows, slots = (ids_TK == expert).nonzero(as_tuple=True)
        product = _tapped(torch.matmul, tap, expert)
        y = swiglu(x_TD.index_select(0, rows), Stacks(*(w[expert] for w in stacks)), product)
        y_TD.index_add_(0, rows, _weighted(y, weights_TK[rows, slots], y_TD.dtype))
    return y_TD.to(x_TD.dtype)


def split(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, stacks: Stacks, tap: Tap | None = None) -> Tensor:
    """``loop`` over tokens sorted by expert: one gather, one scatter, contiguous slices between.

    The fastest on a CPU, where torch's grouped product is itself a loop over groups: here an expert's rows stay
    in the cache through its three products. Reads the counts back to the host, which would stall an accelerator.
    Arguments and result as in ``loop``.
    """
    order_N, rows_N, counts_E = _sort_by_expert(ids_TK, len(stacks.gate))
    slices = x_TD.index_select(0, rows_N).split(counts_E.tolist())
    # unbind, not indexing: the backward of w[e] writes a whole (E, D, F) gradient for every expert.
    experts = zip(slices, map(Stacks._make, zip(*(w.unbind() for w in stacks), strict=True)), strict=True)
    y_ND = torch.cat([swiglu(x, w, _tapped(torch.matmul, tap, e)) for e, (x, w) in enumerate(experts)])
    return _combine(y_ND, x_TD, weights_TK, order_N, rows_N)


def grouped(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, stacks: Stacks, tap: Tap | None = None) -> Tensor:
    """``loop`` as three grouped products (``torch.nn.functional.grouped_mm``) over tokens sorted by expert.

    Never reads back to the host; no token is padded or dropped. Arguments and result as in ``loop``.

    Raises:
        ValueError: a dtype or a width that torch's grouped product does not take.
    """
    if not _grouped_mm_takes(x_TD, stacks.gate):
        raise ValueError(
            "experts='grouped' needs float32, bfloat16 or float16 and dim and hidden of whole 16 bytes, "
            f"got {x_TD.dtype}, dim {stacks.gate.shape[1]} and hidden {stacks.gate.shape[2]}"
        )
    order_N, rows_N, counts_E = _sort_by_expert(ids_TK, len(stacks.gate))
    product: Product = partial(F.grouped_mm, offs=counts_E.cumsum(0).to(torch.int32))
    if tap is not None:
        product = _tapped(product, tap, ids_TK.reshape(-1).index_select(0, order_N))
    y_ND = swiglu(x_TD.index_select(0, rows_N), stacks, product)
    return _combine(y_ND, x_TD, weights_TK, order_N, rows_N)


def batched(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, stacks: Stacks, tap: Tap | None = None) -> Tensor:
    """``loop`` as three batched products: each expert padded to the fullest one, no token dropped.

    Works for every dtype and device; wasteful when the load is skewed. Arguments and result as in ``loop``.
    """
    num_experts, dim = stacks.gate.shape[:2]
    order_N, rows_N, counts_E = _sort_by_expert(ids_TK, num_experts)
    capacity = int(counts_E.max())
    expert_N = ids_TK.reshape(-1).index_select(0, order_N)
    starts_E = counts_E.cumsum(0) - counts_E
    position_N = torch.arange(len(order_N), device=x_TD.device) - starts_E.index_select(0, expert_N)
    cell_N = expert_N * capacity + position_N
    x_ECD = x_TD.new_zeros(num_experts * capacity, dim).index_copy(0, cell_N, x_TD.index_select(0, rows_N))
    product: Product = torch.matmul
    if tap is not None:
        # Padding rows are 0, and so are their gradients: a tap need not be told which they are.
        product = _tapped(product, tap, torch.arange(num_experts, device=x_TD.device).unsqueeze(-1))
    y_ECD = swiglu(x_ECD.view(num_experts, capacity, dim), stacks, product)
    y_ND = y_ECD.reshape(-1, dim).index_select(0, cell_N)
    return _combine(y_ND, x_TD, weights_TK, order_N, rows_N)


def auto(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, stacks: Stacks, tap: Tap | None = None) -> Tensor:
    """The fastest of the others for this device, dtype and width. Arguments and result as in ``loop``."""
    if x_TD.device.type == "cpu":
        function = split
    elif x_TD.dtype is torch.bfloat16 and _grouped_mm_takes(x_TD, stacks.gate):
        function = grouped
    else:
        function = batched
    return function(x_TD, weights_TK, ids_TK, stacks, tap)


class SwiGLUExperts(nn.Module):
    """E SwiGLU experts over stacked weights; ``forward`` gives each token the gated sum of its chosen experts.

    Args:
        num_experts: E ≥ 1.
        dim: D ≥ 1.
        hidden: F ≥ 1, hidden width of one expert.
        compute: "auto", "split", "grouped", "batched" or "loop": the same function, computed differently.

    Attributes:
        fisher_tap: called after every product of tokens with weights of the experts, where it is set
            (``attach(fisher="parameters")`` does).

    Raises:
        ValueError: a size below 1 or an unknown ``compute``.
    """

    fisher_tap: Tap | None = None

    def __init__(self, num_experts: int, dim: int, hidden: int, compute: str = "auto") -> None:
        super().__init__()
        for name, size in {"num_experts": num_experts, "dim": dim, "hidden": hidden}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        functions: dict[str, ExpertFunction] = {f.__name__: f for f in (auto, split, grouped, batched, loop)}
        if compute not in functions:
            raise ValueError(f"experts must be one of {', '.join(functions)}, got {compute!r}")
        self._function = functions[compute]
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_up = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, out_std: float = 0.02) -> None:
        """Draw the weights from N(0, std²), w_down's from N(0, out_std²)."""
        nn.init.normal_(self.w_gate, std=std)
        nn.init.normal_(self.w_up, std=std)
        nn.init.normal_(self.w_down, std=out_std)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Compute ``y_t = Σ_k weights_tk · expert_{ids_tk}(x_t)``.

        Args:
            x_TD: tokens.
            weights_TK: gates, float32.
            ids_TK: int64 chosen experts, in [0, E).

        Returns:
            y_TD in x's dtype.
        """
        dtype = x_TD.dtype
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            # grouped_mm is not on autocast's list, and slices of a weight miss its cache: cast once, here.
            dtype = torch.get_autocast_dtype(device)
        stacks = Stacks(self.w_gate.to(dtype), self.w_up.to(dtype), self.w_down.to(dtype))
        return self._function(x_TD.to(dtype), weights_TK, ids_TK, stacks, self.fisher_tap).to(x_TD.dtype)


def _tapped(product: Product, tap: Tap | None, experts: int | Tensor) -> Product:
    """``product``, and the tap called after it."""
    if tap is None:
        return product

    def tapped(x: Tensor, w: Tensor) -> Tensor:
        y = product(x, w)
        tap(x, y, experts)
        return y

    return tapped


def _grouped_mm_takes(x: Tensor, w: Tensor) -> bool:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in dtypes and all(width * w.element_size() % 16 == 0 for width in w.shape[1:])


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _weighted(y: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return y.to(dtype) * weights.to(dtype).unsqueeze(-1)


def _sort_by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order of the (token, expert) pairs by expert, their tokens, and the pairs of each expert."""
    flat_N = ids_TK.reshape(-1)
    order_N = flat_N.argsort(stable=True)
    return order_N, order_N // ids_TK.shape[1], torch.bincount(flat_N, minlength=num_experts)


def _combine(y_ND: Tensor, x_TD: Tensor, weights_TK: Tensor, order_N: Tensor, rows_N: Tensor) -> Tensor:
    """Gate the sorted pairs and add them up per token, in float32 or better, into x's dtype."""
    y_TD = torch.zeros(x_TD.shape, dtype=_sum_dtype(x_TD), device=x_TD.device)
    weights_N = weights_TK.reshape(-1).index_select(0, order_N)
    return y_TD.index_add_(0, rows_N, _weighted(y_ND, weights_N, y_TD.dtype)).to(x_TD.dtype)
