"""Gating against a plain Python reference, token by token, in float64."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from moegeo_router import routing_probabilities, topk_gating

T, E = 6, 8


def native_scores(row, scores):
    """σ(z_e), or the softmax: from the definitions, with math.exp."""
    if scores == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in row]
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def naive_gating(logits, k, scores, renormalize, groups=None, bias=None, prior=None):
    """One token at a time; ``groups`` is (num_groups, top_groups, group_top). Returns weights by expert, and p.

    ``bias`` is added to the scores that choose, ``prior`` multiplies them.
    """
    chosen_weights, probs = [], []
    for row in logits.double().tolist():
        native = native_scores(row, scores)
        ranking = [s * (1.0 if prior is None else prior[e]) for e, s in enumerate(native)]
        ranking = [s + (0.0 if bias is None else bias[e]) for e, s in enumerate(ranking)]
        eligible = set(range(len(row)))
        if groups is not None:
            num_groups, top_groups, group_top = groups
            size = len(row) // num_groups
            members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
            score = [sum(sorted((ranking[e] for e in m), reverse=True)[:group_top]) for m in members]
            best = sorted(range(num_groups), key=lambda g: -score[g])[:top_groups]
            eligible = {e for g in best for e in members[g]}
        chosen = sorted(eligible, key=lambda e: -ranking[e])[:k]
        total = sum(native[e] for e in chosen) if renormalize else 1.0
        chosen_weights.append({e: native[e] / total for e in chosen})
        probs.append([s / sum(native) for s in native])
    return chosen_weights, torch.tensor(probs, dtype=torch.float64)


def check(logits, k, scores, renormalize, groups=None, bias=None, prior=None, tolerance=1e-12):
    options = {} if groups is None else dict(zip(("num_groups", "top_groups", "group_top"), groups, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if k == 1 else "error")
        gating = topk_gating(
            logits,
            k,
            scores=scores,
            renormalize=renormalize,
            selection_bias=bias,
            log_prior=None if prior is None else prior.log(),
            **options,
        )
    shifts = (None if shift is None else shift.double().tolist() for shift in (bias, prior))
    expected, probs = naive_gating(logits, k, scores, renormalize, groups, *shifts)
    assert gating.weights.shape == gating.ids.shape == (len(logits), k)
    assert gating.ids.dtype == torch.int64
    for t, by_expert in enumerate(expected):
        ids = gating.ids[t].tolist()
        assert set(ids) == set(by_expert)
        assert gating.weights[t].tolist() == pytest.approx([by_expert[e] for e in ids], rel=tolerance)
    torch.testing.assert_close(gating.probs.double(), probs, rtol=tolerance, atol=tolerance)


GROUPS = (None, (4, 2, 1), (4, 2, 2), (2, 1, 2), (2, 1, 4), (8, 5, 1), (1, 1, 2))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shift", [None, "bias", "prior"])
def test_every_combination_is_the_naive_one(scores, renormalize, groups, shift):
    for k, scale in itertools.product((1, 2, 4), (0.3, 4.0)):
        logits = scale * torch.randn(T, E, dtype=torch.float64)
        values = torch.randn(E, dtype=torch.float64)
        shifts = {} if shift is None else {"bias": values} if shift == "bias" else {"prior": values.exp()}
        check(logits, k, scores, renormalize, groups, **shifts)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_groups_are_ranked_by_the_sum_of_their_best(scores):
    """By hand: the first group has the best expert, the second the better two; group_top says which one counts."""
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]], dtype=torch.float64)
    options = {"scores": scores, "num_groups": 2, "top_groups": 1}
    assert set(topk_gating(logits, 2, group_top=1, **options).ids[0].tolist()) == {0, 1}
    if scores == "sigmoid":  # .953 + .0001 < .881 + .881
        assert set(topk_gating(logits, 2, group_top=2, **options).ids[0].tolist()) == {2, 3}
    else:  # here e³ > 2e²; but e³ < 2e^2.5
        sharper = torch.tensor([[3.0, -9.0, 2.5, 2.5]], dtype=torch.float64)
        assert set(topk_gating(sharper, 2, group_top=2, **options).ids[0].tolist()) == {2, 3}


def deepseek_v3(logits, bias, k, num_groups, top_groups, scaling=1.0):
    """DeepSeek-V3's gate as its report and code state it, with masks and one-hots instead of gathers."""
    tokens, experts = logits.shape
    affinity = 1 / (1 + torch.exp(-logits))
    corrected = affinity + bias
    in_group = corrected.view(tokens, num_groups, -1).sort(dim=-1, descending=True).values
    group_rank = in_group[..., :2].sum(-1).argsort(dim=-1, descending=True).argsort(dim=-1)
    allowed = (group_rank < top_groups).repeat_interleave(experts // num_groups, dim=-1)
    rank = torch.where(allowed, corrected, -math.inf).argsort(dim=-1, descending=True).argsort(dim=-1)
    gate = affinity * (rank < k)
    return scaling * gate / gate.sum(-1, keepdim=True)


def test_deepseek_v3():
    logits, bias = torch.randn(50, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    gating = topk_gating(logits, 4, scores="sigmoid", num_groups=8, top_groups=3, selection_bias=bias)
    dense = torch.zeros(50, 16, dtype=torch.float64).scatter(-1, gating.ids, gating.weights)
    torch.testing.assert_close(dense, deepseek_v3(logits, bias, 4, 8, 3), rtol=1e-12, atol=0)


def test_very_negative_biases_do_not_let_masked_groups_in():
    """A mask of 0 instead of -inf would prefer the masked experts to eligible ones with a negative score."""
    logits = torch.randn(20, 8, dtype=torch.float64)
    bias = torch.full((8,), -5.0, dtype=torch.float64)
    check(logits, 3, "sigmoid", True, (2, 1, 2), bias)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_bias_chooses_and_does_not_weigh(scores):
    logits = torch.zeros(1, 4, dtype=torch.float64)
    logits[0, 3] = -1.0
    bias = torch.tensor([0.0, -9.0, -9.0, 9.0], dtype=torch.float64).requires_grad_()
    gating = topk_gating(logits, 2, scores=scores, selection_bias=bias)
    native = native_scores(logits[0].tolist(), scores)
    assert gating.ids.tolist() == [[3, 0]]
    assert gating.weights[0].tolist() == pytest.approx(
        [native[3] / (native[0] + native[3]), native[0] / (native[0] + native[3])]
    )
    assert not gating.weights.requires_grad
    torch.testing.assert_close(gating.probs, routing_probabilities(logits, scores), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_prior_chooses_and_does_not_weigh(scores):
    logits = torch.randn(50, E, dtype=torch.float64)
    log_prior = torch.randn(E, dtype=torch.float64).requires_grad_()
    gating = topk_gating(logits, 3, scores=scores, renormalize=False, log_prior=log_prior)
    plain = topk_gating(logits, E, scores=scores, renormalize=False)
    by_expert = torch.zeros_like(logits).scatter(-1, plain.ids, plain.weights)
    assert not torch.equal(gating.ids, plain.ids[:, :3])
    assert torch.equal(gating.weights, by_expert.gather(-1, gating.ids))
    assert torch.equal(gating.probs, plain.probs)
    assert not gating.weights.requires_grad


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2}])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_prior_of_zeros_changes_no_bit_and_a_constant_no_choice(scores, groups):
    logits = torch.randn(200, E).to(torch.bfloat16)
    plain = topk_gating(logits, 3, scores=scores, **groups)
    for value, log_prior in ((0.0, torch.zeros(E)), (0.7, torch.full((E,), 0.7, dtype=torch.float64))):
        shifted = topk_gating(logits, 3, scores=scores, log_prior=log_prior, **groups)
        # Ties of bf16 logits may be broken otherwise where scores are rounded otherwise.
        assert value or all(map(torch.equal, shifted, plain))
        torch.testing.assert_close(shifted.weights, plain.weights)
        assert torch.equal(shifted.probs, plain.probs)


def test_a_constant_bias_changes_nothing():
    logits = torch.randn(T, E, dtype=torch.float64)
    plain = topk_gating(logits, 3, scores="sigmoid")
    shifted = topk_gating(logits, 3, scores="sigmoid", selection_bias=torch.full((E,), 0.7))
    assert torch.equal(plain.ids, shifted.ids)
    assert torch.equal(plain.weights, shifted.weights)


def test_sigmoid_scores_far_in_the_tail_have_exact_ratios():
    """σ(z) → eᶻ for z → -∞, so at -200 the shares are the softmax of z: no ε, no 0/0."""
    logits = torch.tensor([[-200.0, -201.0, -203.0]])
    expected = torch.tensor([1.0, math.exp(-1), math.exp(-3)])
    p = routing_probabilities(logits, "sigmoid")
    torch.testing.assert_close(p[0], expected / expected.sum(), rtol=1e-6, atol=0)
    gating = topk_gating(logits, 2, scores="sigmoid")
    assert gating.ids.tolist() == [[0, 1]]
    torch.testing.assert_close(gating.weights[0], expected[:2] / expected[:2].sum(), rtol=1e-6, atol=0)


def test_no_epsilon_in_the_weights():
    """HF's ``/ (sum + 1e-20)`` and others' ε would show in float64 at these scores."""
    logits = torch.tensor([[-50.0, -50.0, -60.0]], dtype=torch.float64, requires_grad=True)
    gating = topk_gating(logits, 2, scores="sigmoid")
    assert gating.weights.sum().item() == pytest.approx(1, abs=1e-15)
    assert gating.weights[0].tolist() == [0.5, 0.5]
    gating.weights[0, 0].backward()
    assert logits.grad[0, :2].abs().tolist() == pytest.approx([0.25, 0.25], rel=1e-12)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_against_finite_differences(scores, renormalize):
    logits = (4 * torch.rand(3, 5, dtype=torch.float64)).requires_grad_()

    def outputs(z):
        gating = topk_gating(z, 2, scores=scores, renormalize=renormalize, num_groups=5, top_groups=3, group_top=1)
        return gating.weights, gating.probs

    assert torch.autograd.gradcheck(outputs, (logits,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_renormalised_top_1_warns_because_its_gradient_is_zero(scores):
    logits = torch.randn(T, E, requires_grad=True)
    with pytest.warns(UserWarning, match="top-1 gating with renormalize=True.*no gradient") as record:
        gating = topk_gating(logits, 1, scores=scores)
    assert record[0].filename == __file__
    assert torch.equal(gating.weights, torch.ones(T, 1))
    gating.weights.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(T, E))
    logits.grad = None
    topk_gating(logits, 1, scores=scores, renormalize=False).weights.sum().backward()
    assert (logits.grad.abs().amax(dim=-1) > 0).all()


def test_one_expert_needs_no_warning():
    for scores, expected in (("softmax", 1.0), ("sigmoid", 0.5)):
        gating = topk_gating(torch.zeros(3, 1), 1, scores=scores)
        assert gating.weights.tolist() == [[1.0]] * 3
        assert gating.probs.tolist() == [[1.0]] * 3
        assert topk_gating(torch.zeros(3, 1), 1, scores=scores, renormalize=False).weights.tolist() == [[expected]] * 3


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_all_experts_chosen(scores):
    logits = torch.randn(T, E, dtype=torch.float64)
    gating = topk_gating(logits, E, scores=scores)
    assert (gating.ids.sort(dim=-1).values == torch.arange(E)).all()
    dense = torch.zeros_like(logits).scatter(-1, gating.ids, gating.weights)
    torch.testing.assert_close(dense, gating.probs, rtol=1e-12, atol=0)
    assert (gating.weights.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize(("given", "wide"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")])
def test_dtypes(given, wide):
    # No two alike, even in bf16: ties have no right answer.
    logits = torch.stack([torch.randperm(E) / 4 for _ in range(T)]).to(getattr(torch, given))
    for scores in ("softmax", "sigmoid"):
        gating = topk_gating(logits, 2, scores=scores)
        assert gating.weights.dtype == gating.probs.dtype == getattr(torch, wide)
        torch.testing.assert_close(gating.probs, routing_probabilities(logits, scores))
        check(logits, 2, scores, True, tolerance=1e-5)
        check(logits, 2, scores, True, prior=torch.rand(E) + 0.5, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(E,), (2, 3, E), (0, E), (2, 0, E)])
def test_leading_dimensions(shape):
    logits = torch.randn(shape)
    gating = topk_gating(logits, 2, num_groups=4, top_groups=2)
    assert gating.weights.shape == gating.ids.shape == (*shape[:-1], 2)
    assert gating.probs.shape == shape
    flat = topk_gating(logits.reshape(-1, E), 2, num_groups=4, top_groups=2)
    assert torch.equal(gating.ids.reshape(-1, 2), flat.ids)


@pytest.mark.parametrize("groups", [None, (4, 2, 2)])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_still_give_valid_distinct_ids(scores, groups, bad):
    logits = torch.randn(4, E)
    logits[0] = bad
    logits[1, 3] = bad
    options = {} if groups is None else dict(zip(("num_groups", "top_groups", "group_top"), groups, strict=True))
    gating = topk_gating(logits, 3, scores=scores, **options)
    assert ((gating.ids >= 0) & (gating.ids < E)).all()
    assert all(len(set(row)) == 3 for row in gating.ids.tolist())
    clean = topk_gating(logits[2:], 3, scores=scores, **options)
    assert torch.equal(gating.weights[2:], clean.weights)
    if math.isnan(bad):
        assert gating.weights[0].isnan().all()


@pytest.mark.parametrize("shift", ["selection_bias", "log_prior"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_compiles_without_graph_breaks(scores, shift):
    logits, shift = torch.randn(T, E), {shift: torch.randn(E)}

    def gate(z):
        return topk_gating(z, 2, scores=scores, num_groups=4, top_groups=2, **shift)

    torch._dynamo.reset()
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    results = []
    for function in (gate, compiled):
        z = logits.clone().requires_grad_()
        gating = function(z)
        (gating.weights[:, 0].sum() + gating.probs[:, 1].sum()).backward()
        results.append([gating.ids, gating.weights.detach(), gating.probs.detach(), z.grad])
    torch.testing.assert_close(*results)


GROUPED = {"num_groups": 4, "top_groups": 2}


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        (0, {}, "k must be between 1 and the number of experts 8, got 0"),
        (9, {}, "k must be between 1 and the number of experts 8, got 9"),
        (2, {"scores": "relu"}, "scores must be 'softmax' or 'sigmoid', got 'relu'"),
        (2, {"num_groups": 4}, "num_groups and top_groups go together, got 4 and None"),
        (2, {"top_groups": 4}, "num_groups and top_groups go together, got None and 4"),
        (2, {"num_groups": 3, "top_groups": 1}, "num_groups must divide the number of experts 8, got 3"),
        (2, {"num_groups": 0, "top_groups": 1}, "num_groups must divide the number of experts 8, got 0"),
        (2, {"num_groups": 4, "top_groups": 5}, "top_groups must be between 1 and num_groups 4, got 5"),
        (2, {"num_groups": 4, "top_groups": 0}, "top_groups must be between 1 and num_groups 4, got 0"),
        (5, GROUPED, "k must be at most the eligible experts 4, got 5"),
        (2, {**GROUPED, "group_top": 3}, "group_top must be between 1 and the group size 2, got 3"),
        (2, {**GROUPED, "group_top": 0}, "group_top must be between 1 and the group size 2, got 0"),
        (2, {"selection_bias": torch.zeros(7)}, r"selection_bias must be \(8,\), got \(7,\)"),
        (2, {"selection_bias": torch.zeros(1, 8)}, r"selection_bias must be \(8,\), got \(1, 8\)"),
        (2, {"log_prior": torch.zeros(7)}, r"log_prior must be \(8,\), got \(7,\)"),
        (2, {"log_prior": torch.tensor(0.0)}, r"log_prior must be \(8,\), got \(\)"),
        (
            2,
            {"log_prior": torch.zeros(8), "selection_bias": torch.zeros(8)},
            "selection_bias and log_prior are two ways to shift the same choice: give one of them",
        ),
    ],
)
def test_bad_options(k, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        topk_gating(torch.randn(T, E), k, **options)


def test_bad_logits():
    for gate in (routing_probabilities, lambda z: topk_gating(z, 1, renormalize=False)):
        with pytest.raises(ValueError, match=r"logits must be \(\.\.\., E\) with E >= 1 experts, got shape \(3, 0\)"):
            gate(torch.zeros(3, 0))
        with pytest.raises(ValueError, match=r"got shape \(\)"):
            gate(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"logits must be floating point, got torch\.int64"):
            gate(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="scores must be"):
        routing_probabilities(torch.zeros(3, 4), "tanh")
