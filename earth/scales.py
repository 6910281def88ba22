"""How large a field's variations are at each scale: power by degree of spherical harmonics, from points.

A forecast of least squared error blurs: what it cannot place, it leaves out. The ratio of its variance to the truth's,
degree by degree, says from which scale on. Fields are read at points, here too: `even_points` spreads them, and the
expansion is fitted to them by least squares.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from earth.field import fibonacci_anchors
from earth.geometry import harmonic_degrees, harmonics


class ScaleError(ValueError):
    """Points or values that determine no spectrum. The message names the value and the remedy."""


def even_points(degree: int, *, oversampling: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """(latitude, longitude) in degrees of a Fibonacci sphere that determines an expansion to `degree`: `oversampling`
    points for each of its (degree + 1)^2 coefficients.
    """
    points = fibonacci_anchors(int(np.ceil(oversampling * (degree + 1) ** 2)), (0.0,))
    return np.asarray(points.latitude, np.float64), np.asarray(points.longitude, np.float64)


def power_by_degree(
    values: Float[np.ndarray, "*t n"], latitude: Float[np.ndarray, " n"], longitude: Float[np.ndarray, " n"],
    degree: int,
) -> Float[np.ndarray, "*t degree"]:  # fmt: skip
    """Mean square over the sphere of the part of each degree, 0 to `degree`, in the square of the values' unit: of a
    field without higher degrees they add up to its mean square (Parseval).

    Args:
      values: finite. latitude, longitude: degrees, all over the sphere (`even_points`).

    Raises:
      ScaleError: too few points, or too unevenly spread, for the degree; a value that is not finite.
    """
    basis = harmonics(np.asarray(latitude, float), np.asarray(longitude, float), degree, xp=np)
    if not np.isfinite(values).all():
        raise ScaleError("a value is not finite; a spectrum needs all points: read the field at other points")
    if len(basis) < basis.shape[1] or np.linalg.cond(basis) > 10:
        raise ScaleError(
            f"{len(basis)} points do not determine the {basis.shape[1]} coefficients to degree {degree}; lower the "
            "degree, or take the points of even_points(degree)"
        )
    coefficients = np.asarray(values, float) @ np.linalg.pinv(basis).T
    out = np.zeros((*values.shape[:-1], degree + 1))
    for k, d in enumerate(harmonic_degrees(degree)):
        out[..., d] += coefficients[..., k] ** 2
    return out


def compare_scales(
    forecast: Any, truth: Any, latitude: np.ndarray, longitude: np.ndarray, degree: int
) -> dict[str, np.ndarray]:
    """Spectra of anomalies of several times [T, n], averaged over the times; each [degree + 1].

    Returns:
      `forecast` and `truth`: power; `error`: power of the difference; `ratio`: forecast over truth, 1 where a forecast
      is as lively as the truth, 0 where it says the mean only.
    """
    spectra = {
        name: power_by_degree(np.asarray(field, float), latitude, longitude, degree).mean(0)
        for name, field in (("forecast", forecast), ("truth", truth), ("error", np.asarray(forecast) - truth))
    }
    return spectra | {"ratio": spectra["forecast"] / np.maximum(spectra["truth"], np.finfo(float).tiny)}
