"""Several bands on projections at once: the smallest change of a residual that puts every projection into its band.

minimise |delta|^2 subject to lo <= V (h + delta) <= hi, rows of V of norm 1. The solution is delta = V^T x with x from the dual:
coordinate ascent (Hildreth 1957) finds which bounds bind, a linear solve makes those exact, and both repeat until the
Karush-Kuhn-Tucker conditions hold. The answer is unique, so the order of the bands cannot matter.
"""

from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor

from persona_lens.errors import SteeringError

SWEEPS: Final = 40  # coordinate sweeps between two exact solves
ROUNDS: Final = 60
TOLERANCE: Final = 1e-9


def require_feasible(
    directions: Float[Tensor, "band d_model"], low: Float[Tensor, " band"], high: Float[Tensor, " band"], names: list[str]
) -> None:
    """Raise unless some residual satisfies every band (always so where the directions are linearly independent).

    Raises:
        SteeringError: a band whose floor lies above its ceiling, or bands that contradict each other.
    """
    for name, lo, hi in zip(names, low.tolist(), high.tolist(), strict=True):
        if lo > hi:
            raise SteeringError(f"{name}: the floor {lo:g} lies above the ceiling {hi:g}")
    gram = (directions.double() @ directions.double().T).cpu().numpy()
    bounds_low, bounds_high = low.double().cpu().numpy(), high.double().cpu().numpy()
    rows, limits = [], []
    for i in range(len(gram)):
        if np.isfinite(bounds_high[i]):
            rows.append(gram[i])
            limits.append(bounds_high[i])
        if np.isfinite(bounds_low[i]):
            rows.append(-gram[i])
            limits.append(-bounds_low[i])
    if not rows:
        return
    scale = max(1.0, float(np.abs(limits).max()))
    found = linprog(
        np.zeros(len(gram)), A_ub=np.array(rows), b_ub=np.array(limits) / scale + 1e-7, bounds=(None, None), method="highs"
    )
    if not found.success:
        raise SteeringError(f"no residual satisfies all bands at once ({'; '.join(names)}): widen one or drop one")


def smallest_change(
    residual: Float[Tensor, "*batch d_model"],
    directions: Float[Tensor, "band d_model"],
    low: Float[Tensor, " band"],
    high: Float[Tensor, " band"],
) -> Float[Tensor, "*batch d_model"]:
    """The smallest delta with low <= V (h + delta) <= high, for every residual h; zero where h satisfies the bands already.

    Args:
        directions: rows of norm 1 (V), fp32 or fp64.
    """
    v = directions.double()
    h = residual.double().reshape(-1, v.shape[-1])
    p = h @ v.T
    x = p.clamp(low.double(), high.double()) - p if len(v) == 1 else _dual(p, v @ v.T, low.double(), high.double())
    return (x @ v).reshape(residual.shape).to(residual.dtype)


def _dual(
    p: Float[Tensor, "token band"], gram: Float[Tensor, "band band"], low: Float[Tensor, " band"], high: Float[Tensor, " band"]
) -> Float[Tensor, "token band"]:
    """x with low <= p + G x <= high, x_i >= 0 where the floor binds, <= 0 where the ceiling binds, else 0."""
    x = torch.zeros_like(p)
    scale = p.abs().amax(-1).clamp(min=1.0)
    for _ in range(ROUNDS):
        x = _coordinate_ascent(x, p, gram, low, high)
        exact = _solve_binding(x, p, gram, low, high)
        ok = _violation(exact, p, gram, low, high) <= TOLERANCE * scale
        x = torch.where(ok[:, None], exact, x)
        if bool(ok.all()) or bool((_violation(x, p, gram, low, high) <= TOLERANCE * scale).all()):
            break
    return x


def _coordinate_ascent(x: Tensor, p: Tensor, gram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    x = x.clone()
    for _ in range(SWEEPS):
        for i in range(len(gram)):
            rest = p[:, i] + x @ gram[i] - gram[i, i] * x[:, i]  # projection i without its own multiplier
            x[:, i] = (rest.clamp(low[i], high[i]) - rest) / gram[i, i]
    return x


def _solve_binding(x: Tensor, p: Tensor, gram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Make the bounds that x says bind hold exactly (least squares where directions depend on each other)."""
    binds = x != 0
    target = torch.where(x > 0, low, high)
    target = torch.where(binds, target, p)
    outer = binds[:, :, None] & binds[:, None, :]
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    matrix = torch.where(outer, gram, identity * (~binds)[:, None, :])
    inverse = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
    return (inverse @ (target - p)[..., None])[..., 0] * binds


def _violation(x: Tensor, p: Tensor, gram: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far x is from the optimality conditions: bounds broken, or a multiplier of the wrong sign."""
    q = p + x @ gram
    broken = torch.maximum(low - q, q - high).clamp(min=0).amax(-1)
    none = torch.zeros_like(q)
    slack = torch.maximum(torch.where(x > 0, (q - low).abs(), none), torch.where(x < 0, (high - q).abs(), none)).amax(-1)
    return torch.maximum(broken, slack)
