"""Where a newcomer's row goes: what it takes from its donor, and how little else changes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moegeo_router.control.placement import dense_gates, donors_for, place_row, turned_row, with_newcomer
from moegeo_router.routers import topk_gating

N, D, E = 200, 6, 5
DEAD = 4


def layer(seed: int = 0, shift: float = 1.0, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return x (N, D), weight (E, D), bias and logits; the last expert is chosen by no token."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=torch.float64) + shift
    weight = torch.randn(E, D, generator=g, dtype=torch.float64)
    weight[DEAD] = -3 * x.mean(0)
    b = torch.randn(E, generator=g, dtype=torch.float64) if bias else None
    if b is not None:
        b[DEAD] = -20
    return x, weight, b, x @ weight.T + (0 if b is None else b)


def donor_of(z: Tensor, k: int) -> int:
    return int(torch.bincount(z.topk(k).indices.flatten(), minlength=E)[:DEAD].argmax())


def gates_by_hand(z: Tensor, k: int, scores: str, renormalize: bool = True) -> Tensor:
    gates = torch.zeros_like(z)
    for n, row in enumerate(z):
        chosen = sorted(range(len(row)), key=lambda e: -float(row[e]))[:k]
        s = row.exp() / row.exp().sum() if scores == "softmax" else row.sigmoid()
        gates[n, chosen] = s[chosen] / (s[chosen].sum() if renormalize else 1)
    return gates


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_dense_gates(scores, renormalize):
    z = layer()[3]
    gates = dense_gates(z, 2, scores, renormalize)
    assert torch.allclose(gates, gates_by_hand(z, 2, scores, renormalize))
    assert torch.allclose(gates.sum(-1), torch.ones(N, dtype=z.dtype)) == renormalize


def test_donors_share_the_work():
    assert donors_for([1, 3, 4], [0.6, 0.0, 0.25, 0.0, 0.0, 0.15]) == {1: 0, 3: 0, 4: 2}
    assert donors_for([2, 3], [0.5, 0.5, 0.0, 0.0]) == {2: 0, 3: 1}  # a tie goes to the first
    assert donors_for([], [0.0]) == {}
    with pytest.raises(ValueError, match="no live expert"):
        donors_for([0, 1], [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"dead must be experts in 0..1, got 2"):
        donors_for([2], [1.0, 0.0])


@given(load=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6), dead=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_donors_are_the_greedy_best(load, dead):
    everyone = [*load, *[0.0] * dead]
    given_to = donors_for(range(len(load), len(everyone)), everyone)
    copies = dict.fromkeys(range(len(load)), 0)
    for donor in given_to.values():
        assert load[donor] / (1 + copies[donor]) == max(load[e] / (1 + copies[e]) for e in copies)
        copies[donor] += 1


@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    most=st.sampled_from([0.01, 0.05, 0.2]),
    merged=st.booleans(),
    renormalize=st.booleans(),
    shift=st.sampled_from([0.0, 1.0, 4.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_gates_move_within_the_bound(seed, k, bias, scores, most, merged, renormalize, shift):
    x, weight, b, z = layer(seed, shift, bias)
    donor = donor_of(z, k)
    options = {"k": k, "scores": scores, "most": most, "merged": merged, "renormalize": renormalize}
    found = place_row(x, z, None, weight, b, donor=donor, dead=DEAD, **options)
    assert found is not None
    if not found.share:  # none was found: all stays as it is
        assert torch.equal(found.row, weight[DEAD])
        assert found.moved == 0
        return
    # Computed from nothing but the new weight.
    new, new_bias = weight.clone(), 0 if b is None else b.clone()
    new[DEAD] = found.row
    if b is not None:
        new_bias[DEAD] = found.bias
    after = x @ new.T + new_bias
    before_gates, gates = (gates_by_hand(logits, k, scores, renormalize) for logits in (z, after))
    share = float((gates[:, DEAD] > 0).double().mean())
    if merged:
        gates[:, donor] += gates[:, DEAD]
        gates[:, DEAD] = 0
    moved = float((gates - before_gates).abs().sum(-1).mean() / 2)
    assert moved <= most + 1e-9
    assert (found.share, found.moved) == pytest.approx((share, moved), abs=1e-6)
    assert torch.allclose(with_newcomer(x, z, weight, b, DEAD, found), after)
    own = (z.topk(k).indices == donor).any(-1)
    assert float((after[own, DEAD] > after[own, donor]).double().mean()) <= 0.25
    assert share <= max(k / E, float(own.double().mean()) / 4)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_tight_bound_takes_fewer_tokens(bias):
    x, weight, b, z = layer(3, bias=bias)
    donor = donor_of(z, 2)
    places = [place_row(x, z, None, weight, b, donor=donor, dead=DEAD, k=2, most=most) for most in (0.001, 0.02, 0.2)]
    shares = [place.share for place in places]
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert shares[0] < shares[2]


def two_clusters(prior: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expert 0 has a large cluster and, within it, a quarter that lies elsewhere; the others have tokens of theirs."""
    g = torch.Generator().manual_seed(0)
    centres = torch.zeros(4, D, dtype=torch.float64)
    centres[0, :2] = torch.tensor([5.0, 0.0])
    centres[1, :2] = torch.tensor([5.0, 4.0])
    centres[2, 2], centres[3, 3] = 5.0, 5.0
    cluster = torch.tensor([0] * 75 + [1] * 25 + [2] * 50 + [3] * 50)
    x = centres[cluster] + 0.1 * torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = torch.zeros(E, D, dtype=torch.float64)
    weight[0, 0], weight[1, 2], weight[2, 3] = 2.0, 2.0, 2.0
    weight[3], weight[DEAD] = -1.0, -1.0
    z = x @ weight.T
    z[:, DEAD] += prior
    return x, weight, z, cluster


@pytest.mark.parametrize("prior", [0.0, 3.0], ids=["no prior", "the dead expert has a prior"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_the_newcomer_takes_the_tokens_that_hurt(bias, prior):
    x, weight, z, cluster = two_clusters(prior)
    hurt = torch.zeros_like(z)
    hurt[cluster == 1, 0] = 1.0
    b = torch.zeros(E, dtype=torch.float64) if bias else None
    found = place_row(x, z, hurt, weight, b, donor=0, dead=DEAD, k=1, most=0.01)
    after = with_newcomer(x, z, weight, b, DEAD, found)
    assert found.share == 0.125  # of all tokens
    assert torch.equal((after.argmax(-1) == DEAD).nonzero().squeeze(), (cluster == 1).nonzero().squeeze())
    difference = (after[:, DEAD] - after[:, 0])[cluster <= 1]
    assert float(difference.std(correction=0)) == pytest.approx(1, rel=0.3)  # a level is not quite a constant
    assert found.moved == 0


def test_without_a_gradient_the_least_certain_tokens_are_served_worst():
    x, weight, z, _ = two_clusters()
    away = torch.zeros(D, dtype=torch.float64)
    away[4] = 1
    x = x + 3 * torch.linspace(-1, 1, N, dtype=torch.float64)[:, None] * away
    weight[1, 4] = 0.5  # the rival of expert 0 grows along that axis
    z = x @ weight.T
    for hurt in (None, torch.zeros_like(z)):
        found = place_row(x, z, hurt, weight, None, donor=0, dead=DEAD, k=1, most=0.05)
        assert float(found.row[4]) > 0.1


def test_the_gradient_goes_before_the_probability():
    x, weight, z, cluster = two_clusters()
    for sign in (1.0, -1.0):
        hurt = torch.zeros_like(z)
        hurt[:, 0] = sign * x[:, 1]
        hurt[:, 1] = 100 * torch.randn(N, dtype=torch.float64)  # of other experts: nobody's business
        found = place_row(x, z, hurt, weight, None, donor=0, dead=DEAD, k=1, most=0.05)
        assert sign * float(found.row[1]) > 0.05
        assert int((cluster == 1).sum()) == 25


def test_unit_rows_stay_unit_rows():
    x, weight, _, z = layer()
    weight = torch.nn.functional.normalize(weight, dim=-1)
    z = 4 * x @ weight.T
    found = place_row(4 * x, z, None, weight, None, donor=donor_of(z, 2), dead=DEAD, k=2, most=0.1, unit=True)
    assert float(found.row.norm()) == pytest.approx(1)
    assert found.share > 0
    assert found.moved <= 0.1


@pytest.mark.parametrize("case", ["no rows", "no tokens", "all alike", "not linear", "not finite"])
def test_where_nothing_can_be_told(case):
    x, weight, b, z = layer()
    donor = donor_of(z, 1)
    if case == "no rows":
        x, z = x[:0], z[:0]
    elif case == "no tokens":
        z[:, donor] -= 100
    elif case == "all alike":
        x = x[:1].expand(N, D)
        z = x @ weight.T
        donor = donor_of(z, 1)
    elif case == "not linear":
        z = z + torch.randn_like(z)
    else:
        x[0, 0] = torch.nan
    assert place_row(x, z, None, weight, b, donor=donor, dead=DEAD, k=1, most=0.1) is None


def test_a_turned_row():
    weight, bias = torch.randn(E, D), torch.randn(E)
    place = turned_row(weight, bias, 2, torch.Generator().manual_seed(0), angle=0.2)
    assert torch.allclose(place.row.norm(), weight[2].norm())
    assert float(torch.nn.functional.cosine_similarity(place.row, weight[2], dim=0).arccos()) == pytest.approx(0.2)
    assert (place.bias, place.share, place.moved) == (float(bias[2]), None, None)
    again = turned_row(weight, None, 2, torch.Generator().manual_seed(0), angle=0.2)
    assert torch.equal(again.row, place.row)
    assert again.bias == 0
    zero = turned_row(torch.zeros(E, D), None, 2, torch.Generator())
    assert not zero.row.any()


def test_arguments_are_checked():
    x, weight, b, z = layer()
    with pytest.raises(ValueError, match="two experts, got 1 twice"):
        place_row(x, z, None, weight, b, donor=1, dead=1, k=1, most=0.1)
    with pytest.raises(ValueError, match="most must be above 0, got 0"):
        place_row(x, z, None, weight, b, donor=1, dead=2, k=1, most=0)


def test_the_gates_are_the_models():
    z = layer()[3]
    gating = topk_gating(z, 2)
    assert torch.allclose(dense_gates(z, 2, "softmax").gather(-1, gating.ids), gating.weights)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("k", [1, 2])
def test_mostly_there_is_a_place(k, bias):
    found = []
    for seed in range(20):
        x, weight, b, z = layer(seed, 1.0, bias)
        found.append(place_row(x, z, None, weight, b, donor=donor_of(z, k), dead=DEAD, k=k, most=0.05).share)
    assert sum(share > 0.01 for share in found) >= 18


def test_probability_that_a_newcomer_takes_from_its_donor_counts_where_gates_are_not_renormalised():
    x, weight, z, cluster = two_clusters()
    hurt = torch.zeros_like(z)
    hurt[cluster == 1, 0] = 1.0
    place = {"donor": 0, "dead": DEAD, "k": 1, "most": 0.2}
    shared, split = (place_row(x, z, hurt, weight, None, renormalize=r, **place) for r in (True, False))
    assert shared.moved == 0
    assert 0.02 < split.moved <= 0.2
