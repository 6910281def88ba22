"""Distance-biased attention between points and the anchors near them: how the field is read, and how it is fed.

    near = nearest(points, anchors, k)                                    # earth.neighbours
    meet = pairs(points, anchors, near, frame=frame, where=there)
    out = attend(query, key, value, decay, meet)                          # points read anchors: [N, H, V]
    out, mass = collect(query, key, value, decay, prior, meet)            # anchors read points: [M, H, V], [M, H]

The score of a point n and an anchor m with d2 = |x_n - u_m|^2 is, per head h,

    <q, k> / sqrt(K) - decay[m, h] d2 + 2 log(1 - d2 / radius2[n])        -inf where d2 >= radius2[n]

The last term is a taper: weights fade with zero slope at the edge of the neighbourhood, so that what is read stays
continuous where neighbours change (k >= 2; with one neighbour the softmax undoes the taper). Values may be multiplied
by a moment, linear in the position of the point as its anchor sees it: a first-order expansion about each anchor.

    g[n, m, h] = coefficient[h, 0] + sum over c of coefficient[h, 1 + c] (frame[m, c] . (x_n - u_m))

The design is ours (earth_o1 section 4; the paper's field is not public).

Implementations, each for both directions and their gradients:

    reference     dense, O(N M): the meaning
    gather        plain XLA over the N x k pairs: CPU, and wherever there is no kernel, while they fit
    blocked       XLA only, blocks of points against the union of their neighbours: the same for more pairs
    pallas_tpu    Mosaic: tiles of points against tiles of anchors, masked by distance
    pallas_gpu    Triton: the same tiles

By default the one is taken that fits the platform being lowered for. Scores and sums are float32; results have the
dtype of `value`. Order along points and anchors is free; no result depends on it. Under `moe.sharding.use_mesh` with
rules that split points and anchors, every device has its part of both (`sharded`), whatever the implementation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from earth.kernels.neighbour_attention import sharded
from earth.kernels.neighbour_attention.choice import implementation_of, run_pass
from earth.kernels.neighbour_attention.shapes import (
    ANCHORS,
    POINTS,
    NeighbourAttentionError,
    Pairs,
    check_operands,
    pairs,
)

__all__ = ["IMPLEMENTATIONS", "NeighbourAttentionError", "Pairs", "attend", "collect", "pairs"]

IMPLEMENTATIONS = ("reference", "gather", "blocked", "pallas_tpu", "pallas_gpu")


def attend(
    query: Float[Array, "N H K"],
    key: Float[Array, "M H K"],
    value: Float[Array, "M H V"],
    decay: Float[Array, "M H"],
    pairs: Pairs,
    *,
    coefficient: Float[Array, "H D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N H V"]:
    """Points read anchors: the softmax over a point's neighbours of the score, times moment times value.

    Differentiable in query, key, value, decay and coefficient; positions, radii and frames carry no gradient (`pairs`
    stops it). Points without neighbours read 0.

    Args:
      decay: of every anchor and head, per unit of squared distance.
      coefficient: [H, 1 + C] moments (needs `pairs(frame=)`); None: plain attention.
      implementation: one of IMPLEMENTATIONS; None: by the platform being lowered for.

    Raises:
      NeighbourAttentionError: operands that do not fit, or an unknown implementation.
    """
    check_operands(POINTS, query, key, value, decay, None, coefficient, pairs)
    key = key.astype(jnp.float32) * key.shape[-1] ** -0.5
    query = _there(query, pairs)
    return _run(POINTS, implementation, query, key, value, decay, None, coefficient, pairs)[0].astype(value.dtype)


def collect(
    query: Float[Array, "M H K"],
    key: Float[Array, "N H K"],
    value: Float[Array, "N H V"],
    decay: Float[Array, "M H"],
    prior: Float[Array, "M H"],
    pairs: Pairs,
    *,
    coefficient: Float[Array, "H D"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "M H V"], Float[Array, "M H"]]:
    """Anchors read the points whose neighbours they are, against a prior of value 0.

    With the weights w = exp(score): out = sum of w g value / (exp(prior) + sum of w), mass = sum of w / (exp(prior) +
    sum of w), in [0, 1). Both 0 for an anchor that no point has for its neighbour.

    Differentiable in query, key, value, decay, prior and coefficient; positions, radii and frames carry no gradient.

    Args:
      decay, coefficient, implementation: as for `attend`.
      prior: finite logit of what the anchor already knows.

    Returns:
      (out [M, H, V], mass [M, H]).

    Raises:
      NeighbourAttentionError: operands that do not fit, or an unknown implementation.
    """
    check_operands(ANCHORS, query, key, value, decay, prior, coefficient, pairs)
    query = query.astype(jnp.float32) * query.shape[-1] ** -0.5
    key, value = _there(key, pairs), _there(value, pairs)
    prior = prior.astype(jnp.float32)
    out, total = _run(ANCHORS, implementation, query, key, value, decay, prior, coefficient, pairs)
    return out.astype(value.dtype), -jnp.expm1(jnp.minimum(prior - total, 0)).astype(value.dtype)


def _there(array: jax.Array, pairs: Pairs) -> jax.Array:
    """Rows of points that are not there as zeros: NaN times a weight of 0 would be NaN, in gradients too."""
    return array if pairs.where is None else jnp.where(pairs.where[:, None, None], array, 0)


def _run(side: str, implementation: str | None, *operands: Any) -> tuple[jax.Array, jax.Array]:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise NeighbourAttentionError(f"implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference":
        return implementation_of("reference").forward(*operands, side=side)
    return _attention(side, implementation, sharded.mesh_axes(), *operands)


def _pass(name: str, side: str, implementation: str | None, axes: tuple[str, ...], *operands: Any) -> Any:
    if axes:
        return getattr(sharded, name)(side, implementation, axes, *operands)
    return run_pass(name, side, implementation, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(side, implementation, axes, query, key, value, decay, prior, coefficient, pairs):
    return _pass("forward", side, implementation, axes, query, key, value, decay, prior, coefficient, pairs)


def _forward(side, implementation, axes, *operands):
    made: Any = _attention(side, implementation, axes, *operands)
    return made, (operands, *made)


def _backward(side, implementation, axes, saved, grads):
    operands, out, total = saved
    query, key, value, decay, prior, coefficient, pairs = operands
    grad, grad_total = grads
    # What every weight of a row loses for the others' sake; the logarithm of the total feels each weight alike.
    rest = jnp.sum(out * grad, -1) - grad_total
    given = (query, key, value, decay, coefficient, pairs, total, grad, rest)
    made = _pass("backward", side, implementation, axes, *given)
    of_prior = None if prior is None else -jnp.exp(prior - total) * rest
    *first, of_coefficient = made
    first = [g.astype(a.dtype) for g, a in zip(first, (query, key, value, decay), strict=True)]
    of_coefficient = None if coefficient is None else of_coefficient.astype(coefficient.dtype)
    return *first, of_prior, of_coefficient, None


_attention.defvjp(_forward, _backward)
