"""The sensor-denial matrix: what the sensors that are given tell of the one that is not.

Rows are sets of sensors that the analyses read, columns the sensor that is predicted at its own reports of the last
window, none of which was read. Every cell is scored beside two baselines on the same reports: the climate, and a linear
regression from the reports of the given sensors near the point. The regression is fitted on training windows; its
features are, for every given sensor and variable, the mean anomaly of the reports of the window near the point,
weighted by nearness at two lengths and shrunk to the climate where nothing is near (ours).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.spatial import KDTree

from earth.world import forecasts, model
from earth.world.model import Params, WorldConfig
from earth.world.records import Record, Tokens, host_place

_NEAR = 12
_ROWS = 4000


def denial_matrix(
    params: Params, record: Record, ends: Any, training: Record, training_ends: Any, *,
    cfg: WorldConfig, given: Mapping[str, Sequence[str]], predicted: Sequence[str], cycles: int = 1,
    penalty: float = 1e-2, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Scores of every set of given sensors and every sensor predicted.

    Args:
      record: reports to verify with; `ends`: ends (datetime64) of the windows.
      training, training_ends: for the regression.
      given: {name of the row: sensors that are read}.
      predicted: sensors to predict; cells whose row reads the sensor itself are scored too (it is then withheld).
      cycles: windows of an analysis; the regression sees the last one only.
      penalty: of the regression, per row and in units of the features' variance.

    Returns:
      Columns given, predicted, variable, rmse, rmse_climate, rmse_regression (standard deviations about the normal),
      n, and ratio: rmse over the smaller of the two baselines. For intervals `attrs["errors"]` has the mean squares of
      each window, {(given, predicted): [windows, V, 3]}: of the model, the climate, the regression.
    """
    from tqdm import tqdm

    read = jax.jit(lambda state, t: model.read(params, state, t, cfg=cfg))
    rows, errors = [], {}
    bar = tqdm(total=len(given) * len(predicted), desc="denial", disable=not progress)
    for name, sensors in given.items():
        for target in predicted:
            shown = {s.sensor: s.sensor in sensors and s.sensor != target for s in cfg.sensors}
            others = [s for s, on in shown.items() if on]
            bar.update()
            if not others:
                continue
            weights = _fit(training, training_ends, others, target, penalty)
            squares = []
            for end in ends:
                window = record.window(_seconds(end), np.random.default_rng(0))
                t = window[target]
                if not t.mask.any():
                    continue
                state = forecasts.analyse(params, record, end, cycles=cycles, cfg=cfg, given=shown)
                z, _ = read(state, {target: jax.tree.map(jnp.asarray, t)})[target]
                linear = nearby_means(record, window, others, t.latitude, t.longitude) @ weights
                found = [t.value - np.asarray(z), t.value, t.value - linear]
                squares.append([[(np.where(t.mask, e, 0.0) ** 2).sum(0) for e in found], [t.mask.sum(0)] * 3])
            if not squares:
                continue
            total = np.asarray(squares, np.float64)  # [windows, 2, 3, V]
            errors[name, target] = np.moveaxis(total[:, 0] / np.maximum(total[:, 1], 1), 1, 2)
            rms = np.sqrt(total[:, 0].sum(0) / np.maximum(total[:, 1].sum(0), 1))
            for i, variable in enumerate(cfg.sensor(target).variables):
                ours, climate, regression = rms[:, i]
                rows.append(
                    {
                        "given": name, "predicted": target, "variable": variable, "rmse": ours,
                        "rmse_climate": climate, "rmse_regression": regression, "n": int(total[:, 1, 0, i].sum()),
                        "ratio": ours / min(climate, regression),
                    }
                )  # fmt: skip
    bar.close()
    table = pd.DataFrame(rows)
    table.attrs["errors"] = errors
    return table


def _seconds(time: Any) -> int:
    return int(np.datetime64(time, "s").astype(np.int64))


def nearby_means(
    record: Record, window: Mapping[str, Tokens], sensors: Sequence[str], latitude: Any, longitude: Any
) -> np.ndarray:
    """[Q, F] features of a linear regression at points (degrees): a constant and, for every sensor and variable, the
    means of a window's anomalies within half an anchor spacing and within one, weighted by nearness.
    """
    points = np.asarray(latitude), np.asarray(longitude)
    at = host_place(record.field, *points, np.zeros(len(points[0])))
    parts = [np.ones((len(at), 1))]
    for name in sensors:
        o = window[name]
        there = o.mask.any(-1)
        v = o.value.shape[-1]
        if not there.any():
            parts.append(np.zeros((len(at), 2 * v)))
            continue
        place = host_place(record.field, *(np.asarray(x)[there] for x in (o.latitude, o.longitude, 0 * o.height)))
        distance, index = KDTree(place).query(at, min(_NEAR, len(place)))
        distance, index = distance.reshape(len(at), -1), index.reshape(len(at), -1)
        value, mask = np.where(o.mask, o.value, 0.0)[there][index], o.mask[there][index]
        for length in (0.5, 1.0):
            weight = np.exp(-0.5 * (distance / length) ** 2)[..., None] * mask
            # shrunk to 0, the climate, where nothing is near
            parts.append((weight * value).sum(1) / (weight.sum(1) + 0.3))
    return np.concatenate(parts, -1)


def regress(features: np.ndarray, values: np.ndarray, penalty: float) -> np.ndarray:
    """[F, V] coefficients of a ridge of values [Q, V], NaN where they are not known, on `nearby_means`; the constant
    is free.

    Args:
      penalty: in units of the features' mean square.
    """
    out = np.zeros((features.shape[1], values.shape[1]))
    for i, known in enumerate(np.isfinite(values).T):
        a, b = features[known], values[known, i]
        gram = a.T @ a / len(a)
        ridge = penalty * np.diag(np.r_[0.0, np.full(len(gram) - 1, np.trace(gram) / len(gram))])
        out[:, i] = np.linalg.solve(gram + ridge, a.T @ b / len(a))
    return out


def _fit(record: Record, ends: Any, others: Sequence[str], target: str, penalty: float) -> np.ndarray:
    x, y = [], []
    for end in ends:
        window = record.window(_seconds(end), np.random.default_rng(1))
        t = window[target]
        keep = t.mask.any(-1)
        x.append(nearby_means(record, window, others, t.latitude[keep], t.longitude[keep]))
        y.append(np.where(t.mask, t.value, np.nan)[keep])
    return regress(np.concatenate(x), np.concatenate(y), penalty)
