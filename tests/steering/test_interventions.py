"""The formulas of interventions: dose 0, full dose, caps against a reference solver, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from persona_lens.errors import SteeringError
from persona_lens.steering import Band, ablate, add, add_increments, cap, custom, rotate
from persona_lens.steering.bands import require_feasible, smallest_change
from persona_lens.steering.interventions import Intervention, rotated
from persona_lens.vectors import PersonaVectors

LAYERS, WIDTH = 4, 16


def vectors(seed: int = 0, layers: int = LAYERS, width: int = WIDTH) -> PersonaVectors:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(layers, width, generator=generator)
    flat = torch.ones(layers)
    return PersonaVectors(f"trait{seed}", "response_mean", "mean_difference", v, v[None], flat, flat, flat)


def units(n: int, seed: int, width: int = WIDTH) -> Tensor:
    v = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v[1:] += 0.6 * v[:1]  # far from orthogonal
    return v / v.norm(dim=-1, keepdim=True)


def bands(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    low = generator.normal(size=n) * 2
    high = low + np.abs(generator.normal(size=n))
    low[generator.random(n) < 0.25] = -np.inf
    high[generator.random(n) < 0.25] = np.inf
    return torch.tensor(low), torch.tensor(high)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 7), seed=st.integers(0, 10_000))
def test_feasible_bands_all_hold_and_the_change_is_the_smallest(n: int, seed: int) -> None:
    v, (low, high) = units(n, seed), bands(n, seed)
    h = 3 * torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    require_feasible(v, low, high, [str(i) for i in range(n)])
    delta = smallest_change(h, v, low, high)
    q = (h + delta) @ v.T
    size = h.norm(dim=-1)
    assert float((torch.maximum(low - q, q - high).amax(-1) / size).max()) <= 1e-7
    for i in range(len(h)):
        best = reference(h[i].numpy(), v.numpy(), low.numpy(), high.numpy())
        assert float(delta[i].norm()) <= best * (1 + 1e-5) + 1e-7


def reference(h: np.ndarray, v: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Norm of the smallest feasible change, by a general solver (SLSQP) over coefficients of the directions."""
    gram, p = v @ v.T, v @ h
    constraints = []
    for i in range(len(v)):
        if np.isfinite(low[i]):
            constraints.append({"type": "ineq", "fun": lambda x, i=i: (p + gram @ x)[i] - low[i], "jac": lambda x, i=i: gram[i]})
        if np.isfinite(high[i]):
            constraints.append({"type": "ineq", "fun": lambda x, i=i: high[i] - (p + gram @ x)[i], "jac": lambda x, i=i: -gram[i]})
    found = minimize(
        lambda x: x @ gram @ x,
        np.zeros(len(v)),
        jac=lambda x: 2 * gram @ x,
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    broken = max([0.0, *(-float(c["fun"](found.x)) for c in constraints)])
    return math.sqrt(max(float(found.fun), 0.0)) if found.success and broken < 1e-7 else math.inf


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 6), seed=st.integers(0, 1000))
def test_the_order_of_bands_does_not_matter(n: int, seed: int) -> None:
    v, (low, high) = units(n, seed), bands(n, seed)
    h = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    one, other = smallest_change(h, v, low, high), smallest_change(h, v[order], low[order], high[order])
    assert torch.allclose(one, other, atol=1e-8)


def test_a_residual_inside_all_bands_is_not_moved() -> None:
    v = units(3, 0)
    h = torch.randn(5, WIDTH, dtype=torch.float64)
    p = h @ v.T
    assert torch.equal(smallest_change(h, v, p.amin(0) - 1, p.amax(0) + 1), torch.zeros_like(h))


def test_contradictory_bands_are_refused_and_compatible_repeats_are_not() -> None:
    v = units(1, 0).repeat(2, 1)
    require_feasible(v, torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]), ["a", "b"])
    with pytest.raises(SteeringError, match=r"no residual satisfies all bands at once \(a; b\)"):
        require_feasible(v, torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]), ["a", "b"])
    with pytest.raises(SteeringError, match=r"a: the floor 2 lies above the ceiling 1"):
        require_feasible(v[:1], torch.tensor([2.0]), torch.tensor([1.0]), ["a"])
    opposite = torch.cat([v[:1], -v[:1]])
    with pytest.raises(SteeringError, match="no residual satisfies"):
        require_feasible(opposite, torch.tensor([1.0, 1.0]), torch.tensor([torch.inf, torch.inf]), ["a", "b"])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), degrees=st.floats(-180, 180))
def test_rotation_keeps_the_norm_and_turns_by_the_angle(seed: int, degrees: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    h, v = torch.randn(6, WIDTH, generator=generator).double(), torch.randn(WIDTH, generator=generator).double()
    out = rotated(h, v, degrees)
    assert torch.allclose(out.norm(dim=-1), h.norm(dim=-1))
    cosine = (out * h).sum(-1) / (h.norm(dim=-1) ** 2)
    assert torch.allclose(cosine, torch.full_like(cosine, math.cos(math.radians(degrees))), atol=1e-9)
    if degrees > 1:
        before, after = h @ v / h.norm(dim=-1), rotated(h, v, 1.0) @ v / h.norm(dim=-1)
        assert bool((after > before).all())
    parallel = torch.stack([v, -2 * v])
    assert torch.equal(rotated(parallel, v, degrees), parallel)


def test_increments_sum_to_the_last_vector() -> None:
    v = vectors()
    steps = add_increments(v, 1.0)
    assert torch.allclose(torch.stack([s.direction for s in steps]).sum(0), v[LAYERS - 1], atol=1e-6)
    assert torch.equal(steps[0].direction, v[0])
    assert [s.layer for s in add_increments(v, 1.0, layers=[1, 2])] == [1, 2]
    assert torch.equal(add_increments(v, 1.0, layers=[1, 2])[0].direction, v[1])
    with pytest.raises(SteeringError, match="consecutive"):
        add_increments(v, 1.0, layers=[0, 2])
    with pytest.raises(SteeringError, match="consecutive"):
        add_increments(v, 1.0, layers=[])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: add(v, 9, 1.0), "layer 9 does not exist"),
        (lambda v: add(v, 0, math.nan), "strength is not a number"),
        (lambda v: add(v * 0.0, 0, 1.0), "is zero and has no direction"),
        (lambda v: add(v, 0, 1.0, where="answer"), "where='answer' is unknown"),
        (lambda v: cap(v, 0), "give a floor, a ceiling or both"),
        (lambda v: cap(v, 0, floor=2.0, ceiling=1.0), "the floor 2 lies above the ceiling 1"),
        (lambda v: ablate(v, 0, strength=1.5), r"strength must lie in \[0, 1\]"),
        (lambda v: ablate(v, 0, to=math.nan), "floor is not a number"),
        (lambda v: rotate(v, 0, math.nan), "angle is not a number"),
        (lambda v: custom(lambda h, d: h, v, 0, strength=-0.1), r"strength must lie in \[0, 1\]"),
        (lambda v: add(v, 0, 1.0).when(v, above=math.nan), "threshold is not a number"),
    ],
)
def test_bad_input_gets_a_clear_line(make, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        make(vectors())


def test_an_intervention_says_what_it_does() -> None:
    v = vectors()
    assert str(add(v, 2, 1.5)) == "add trait0 at blocks.2.hook_resid_post (strength 1.5), response"
    assert str(cap(v, 1, ceiling=3.0, where="everywhere")).endswith("(projection in [-inf, 3], strength 1), everywhere")
    assert "where trait1 > 0.5" in str(rotate(v, 0, 20.0).when(vectors(1), above=0.5))
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert str(replace(add(v, 0, 1.0), where=mask)).endswith("mask")
    assert isinstance(add(v, 0, 1.0), Intervention)


def test_a_cap_at_percentiles_of_a_calibration_run() -> None:
    v = vectors()
    residuals = torch.randn(401, LAYERS, WIDTH, generator=torch.Generator().manual_seed(5))
    projections = (residuals[:, 2].double() @ v.unit(2).double()).numpy()
    one = cap(v, 2, floor=10.0, ceiling=75.0, percentiles_of=residuals)
    assert isinstance(one.act, Band)
    assert np.mean(projections < one.act.low) == pytest.approx(0.10, abs=0.003)
    assert np.mean(projections > one.act.high) == pytest.approx(0.25, abs=0.003)
    open_ended = cap(v, 2, ceiling=75.0, percentiles_of=residuals).act
    assert isinstance(open_ended, Band)
    assert (open_ended.low, open_ended.high) == (-math.inf, one.act.high)
    for change, message in (
        ({"ceiling": 101.0}, "percentile 101"),
        ({"floor": -1.0}, "percentile -1"),
        ({"floor": 60.0, "ceiling": 40.0}, "floor .* lies above the ceiling"),
        ({"ceiling": 5.0, "percentiles_of": residuals[:, :2]}, "has shape"),
        ({"ceiling": 5.0, "percentiles_of": residuals[:0]}, "at least one sample"),
    ):
        with pytest.raises(SteeringError, match=message):
            cap(v, 2, **{"percentiles_of": residuals, **change})
    with pytest.raises(SteeringError, match="layer 9 does not exist"):
        cap(v, 9, ceiling=5.0, percentiles_of=residuals)
