"""Calibration of a trained model on validation hours: how far to trust each member, and how wide the spread is.

A forecast is a mixture of the linear propagator and the members. Validation weeks are few weather situations, so their
least-squares weights are drawn towards a prior: half of a member that corrects the propagator; of a member that
forecasts by itself little at short leads, where linear dynamics are hard to beat, growing to a half over days. (All
ours; on stations-v1 weights from six weeks of validation alone lost to constant ones.)
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from earth import geometry
from earth.forecast import mixture, predict_members
from earth.model import Params, Queries
from earth.train import Prepared

_PRIOR = 3.0  # the prior counts as much as three times the validation hours
_OWN_HOURS = 48.0


def prior_weights(residual: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """[E, K] weights of the members before validation: `residual` [E] 1 corrects the propagator, 0 forecasts by
    itself; kinds share their weight equally.
    """
    residual, leads = np.asarray(residual, float)[:, None], np.asarray(leads, float)
    own = 0.5 * (1.0 - np.exp(-leads / _OWN_HOURS)) / max((residual == 0).sum(), 1)
    correct = np.full_like(leads, 0.5) / max((residual == 1).sum(), 1)
    return np.where(residual > 0, correct, own)


def calibrate(params: Params, data: Prepared, *, every: int = 1) -> tuple[Params, dict[str, np.ndarray]]:
    """Weight of every member and factor of the spread per lead knot and channel, from validation hours.

    Args:
      params: with a leading member axis on `network`; data: as prepared.
      every: use every so many-th validation time.

    Returns:
      (params with weights and factors, {"weight": [E, K, C], "calibration": [K, C]}). Weights lie in [0, 1] and sum to
      at most 1, the rest is the propagator's; the factor makes 90 % intervals cover 90 %.
    """
    cfg = data.cfg
    residual = np.asarray(params.network.residual)
    weight = np.repeat(prior_weights(residual, np.asarray(cfg.leads))[..., None], len(cfg.channels), -1)
    factor = np.ones(weight.shape[1:])
    for stream in (s for s in cfg.streams if not s.moving):
        s = data.streams[stream.sensor]
        t0 = s.targets(0, np.zeros(1), 0)
        queries = Queries(*(jnp.asarray(t0[n]) for n in ("latitude", "longitude", "height")))
        times = data.validation_times[::every]
        base, delta, spread = predict_members(params, cfg, data.streams, times, cfg.leads, queries)
        truth = s.targets(times, np.asarray(cfg.leads))
        y = np.where(truth["mask"], truth["value"], np.nan)  # [T, L, Q, V]
        span = cfg.span(stream.sensor)
        for k, lead in enumerate(cfg.leads):
            ok = data.protocol.role(geometry.datetimes(times) + np.timedelta64(round(lead * 3600), "s")) == "validation"
            for v in range(len(stream.variables)):
                c = span.start + v
                left = (y[ok, k, :, v] - base[ok, k, :, c]).reshape(-1)
                fine = np.isfinite(left)
                if fine.sum() < 50:
                    continue
                left = left[fine]
                d = delta[:, ok, k, :, c].reshape(len(delta), -1)[:, fine]
                sd = spread[:, ok, k, :, c].reshape(len(delta), -1)[:, fine]
                w = weight[:, k, c] = _shrunk(left, d, weight[:, k, c])
                mean, wide = mixture(w[:, None], d, sd)
                factor[k, c] = float(np.clip(np.quantile(np.abs(left - mean) / wide, 0.9) / 1.6449, 0.2, 5.0))
    fitted = dataclasses.replace(
        params.fitted, weight=jnp.asarray(weight, jnp.float32), calibration=jnp.asarray(factor, jnp.float32)
    )
    return dataclasses.replace(params, fitted=fitted), {"weight": weight, "calibration": factor}


def _shrunk(left: np.ndarray, delta: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Least-squares weights of delta [E, n] for `left` [n], drawn to the prior, within the simplex."""
    gram = delta.astype(np.float64) @ delta.T
    pull = _PRIOR * np.diag(np.diag(gram) + 1e-12)
    w = np.clip(np.linalg.solve(gram + pull, delta @ left + pull @ prior), 0.0, 1.0)
    return w / max(w.sum(), 1.0)
