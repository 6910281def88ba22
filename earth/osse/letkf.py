"""An ensemble Kalman filter with the true equations at a coarser truncation: the stand-in for a weather centre.

The local ensemble transform Kalman filter of Hunt, Kostelich and Szunyogh (2007, Physica D 230, 112-126; HKS) over the
dynamical core of the nature run. Observations of a window are compared with the members at their own times and
assimilated at its end (4D-LETKF, HKS section 3.6), so that an analysis holds nothing later than its time. Localisation
divides observation error variances by a Gaspari-Cohn function of the distances in km and in ln(p) ("R-localisation").
Multiplicative inflation of the prior (HKS section 3.2.4), relaxation to prior spread (Whitaker and Hamill 2012, Mon.
Wea. Rev. 140, 3078) and additive inflation by climate anomalies keep the spread.

What it knows that a learned model does not: the equations, the forcing and the relief (coarser). What it does not have:
the truth's truncation, its scales between the two truncations, the biases of the instruments. It assimilates stations,
ships, scatterometer winds, aircraft, radiosondes (temperature, wind, height) and radiances; no specific humidity, which
this core's flow does not feel. No static covariance, no bias correction, no balance constraint (ours).

Truncation is no small handicap here: 6 h from perfect initial states T15 misses a T21 truth by 1.7 K and 3.3 m/s at
stations, 6 h from the filter's analyses by 1.9 K and 4.3 m/s. At T21 (a perfect model) the same filter comes within
0.5 K and 1.3 m/s. No result at a coarser truncation is a limit of what data assimilation can do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from earth.geometry import standard_pressure, unit_vector
from earth.osse.nature import GAS_CONSTANT, GRAVITY, Core, NatureConfig, OsseError, dynamical_core, nature_run
from earth.osse.orbits import ground_arc
from earth.osse.radiation import brightness_temperature
from earth.osse.satellites import GeoImager, Sounder
from earth.osse.truth import Truth, hydrostatic_heights, profiles, query, truth_from_dataset
from earth.sensors import SENSORS

_RADIUS = 6371.0  # km
_TB = "brightness_temperature"
_LOW = "lowest_level_"
_UPPER = ("temperature", "u_component_of_wind", "v_component_of_wind", "geopotential_height")
_FIELDS = ("temperature", "u_component_of_wind", "v_component_of_wind", "surface_pressure")
_EPOCH = np.datetime64("2000-01-01T00:00", "ns")  # of made-up time axes
_PADDED = 4096
_HOUR = np.timedelta64(3_600_000_000_000, "ns")
# What T15 cannot represent of T21, and the instruments' biases, SI. Ours: three quarters of the errors at 6 h of a T15
# forecast from perfect initial states (1.7 K, 3.3 m/s, 280 Pa at stations; 1.7 K, 5 m/s at sondes).
_UNRESOLVED = {
    "lowest_level_temperature": 1.3,
    "lowest_level_u_component_of_wind": 2.5,
    "lowest_level_v_component_of_wind": 2.5,
    "surface_pressure": 220.0,
    "temperature": 1.3,
    "u_component_of_wind": 3.8,
    "v_component_of_wind": 3.8,
    "geopotential_height": 25.0,
    _TB: 0.8,
}


class LetkfError(OsseError):
    """A filter that cannot run."""


@dataclasses.dataclass(frozen=True)
class LetkfConfig:
    """The filter.

    Attributes:
      model: the forecast model. Its `save_hours` is the interval of the states that observations are compared with,
        linearly in time; its days and spin-up are those of the run that initial members are taken from.
      members: ensemble size.
      member_days: between the states of the model's own climate that make the first ensemble.
      cycle_hours: between analyses, a multiple of `model.save_hours`.
      radius_km: half-width c of the horizontal Gaspari-Cohn function, which is 0 from 2 c on; inf localises nothing.
      depth: the same in ln(p).
      inflation: factor of the prior covariance.
      relaxation: share of the prior spread that the analysis spread is drawn back to.
      additive: climate anomalies of this size, differences between the first members in a random order, are added to
        the analysis members: the model's own error needs new directions, which scaling the ensemble cannot give.
      seed: of that order.
      unresolved: factor of the errors beyond the stated ones (biases, scales the model does not carry).
      neighbours: observations that enter a column, the nearest.
      thin_km: of each platform's or satellite's values of one variable, channel and layer, the newest in boxes of this
        size is kept; 0 keeps all.
      thin_radiances_km: the same for brightness temperatures.
      gross: departures beyond so many standard deviations are rejected.
      height_difference: m between a footprint's ground and the model's beyond which its radiances are rejected.
      ensemble_forecast: forecast with all members and take their mean, instead of forecasting from the mean analysis.
    """

    model: NatureConfig = dataclasses.field(default_factory=lambda: NatureConfig(truncation=15, save_hours=3))
    members: int = 20
    member_days: int = 10
    cycle_hours: int = 6
    radius_km: float = 1000.0
    depth: float = 1.0
    inflation: float = 1.05
    relaxation: float = 0.9
    additive: float = 0.12
    seed: int = 0
    unresolved: float = 1.0
    neighbours: int = 256
    thin_km: float = 300.0
    thin_radiances_km: float = 600.0
    gross: float = 5.0
    height_difference: float = 400.0
    ensemble_forecast: bool = False

    def __post_init__(self):
        if self.members < 2 or self.neighbours < 1 or self.member_days < 1:
            raise LetkfError(
                f"members={self.members} must be at least 2, neighbours={self.neighbours} and "
                f"member_days={self.member_days} at least 1"
            )
        if self.cycle_hours < 1 or self.cycle_hours % self.model.save_hours or 24 % self.cycle_hours:
            raise LetkfError(
                f"cycle_hours={self.cycle_hours} must divide 24 and be a multiple of save_hours={self.model.save_hours}"
            )
        if self.additive < 0 or self.unresolved < 0:
            raise LetkfError(f"additive={self.additive} and unresolved={self.unresolved} must not be negative")
        if not (self.radius_km > 0 and self.depth > 0 and self.inflation >= 1 and 0 <= self.relaxation <= 1):
            raise LetkfError(
                f"radius_km={self.radius_km} and depth={self.depth} must be positive, "
                f"inflation={self.inflation} at least 1 and relaxation={self.relaxation} in [0, 1]"
            )


# ---- the transform
def gaspari_cohn(ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Correlation of Gaspari and Cohn (1999, QJRMS 125, eq. 4.10) of distance over half-width: 1 at 0, 0 from 2 on."""
    r = jnp.clip(ratio, 0.0, 2.0)
    near = 1 + r**2 * (-5 / 3 + r * (5 / 8 + r * (1 / 2 - r / 4)))
    safe = jnp.maximum(r, 1e-6)
    far = 4 - 5 * r + 5 / 3 * r**2 + 5 / 8 * r**3 - 1 / 2 * r**4 + 1 / 12 * r**5 - 2 / (3 * safe)
    return jnp.where(r <= 1, near, jnp.maximum(far, 0.0))


def transform(
    perturbations: Float[Array, "n m"], departures: Float[Array, " n"], precision: Float[Array, " n"], inflation: Any
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Weights of the ensemble transform Kalman filter (HKS eq. 20-24) for independent observation errors.

    Args:
      perturbations: members in observation space minus their mean.
      departures: observations minus that mean.
      precision: 1 / error variance; 0 leaves an observation out.
      inflation: factor of the prior covariance.

    Returns:
      w and W: the analysis mean is mean + X w, its perturbations X W, for prior perturbations X [.., m].
    """
    members = perturbations.shape[-1]
    scaled = perturbations.T * precision
    values, vectors = jnp.linalg.eigh((members - 1) / inflation * jnp.eye(members) + scaled @ perturbations)
    values = jnp.maximum(values, 1e-6)
    mean = vectors @ ((vectors.T @ (scaled @ departures)) / values)
    return mean, (vectors * jnp.sqrt((members - 1) / values)) @ vectors.T


@jax.jit
def analyse(
    columns: Float[Array, "m f l c"],
    observed: Float[Array, "n m"],
    departures: Float[Array, " n"],
    variance: Float[Array, " n"],
    level: Float[Array, " n"],
    nearest: Int[Array, "c k"],
    horizontal: Float[Array, "c k"],
    levels: Float[Array, "l c"],
    depth: Any,
    inflation: Any,
    relaxation: Any,
) -> Float[Array, "m f l c"]:
    """Analysis ensemble of columns.

    Args:
      columns: m members of f fields on l levels of c columns.
      observed: members in observation space.
      departures: observations minus the mean of `observed`.
      variance: of their errors.
      level: ln(p) where each is seen.
      nearest: k observations of each column.
      horizontal: their localisation, 0 for none.
      levels: ln(p) of the columns' levels.
      depth, inflation, relaxation: as in `LetkfConfig`.
    """
    mean = columns.mean(0)
    spread = observed - observed.mean(1, keepdims=True)
    local, gap, error, height = spread[nearest], departures[nearest], variance[nearest], level[nearest]

    def one_level(arguments):
        at, own = arguments  # [c], [m, f, c]
        precision = horizontal * gaspari_cohn(jnp.abs(height - at[:, None]) / depth) / error
        shift, matrix = jax.vmap(transform, (0, 0, 0, None))(local, gap, precision, inflation)
        centre = own.mean(0)
        away = own - centre
        moved = jnp.einsum("mfc,cmk->kfc", away, matrix)
        before, after = (jnp.sqrt((x**2).sum(0) / (len(own) - 1)) for x in (away, moved))
        moved = moved * (1 + relaxation * (before - after) / jnp.maximum(after, 1e-12))
        return centre + jnp.einsum("mfc,cm->fc", away, shift) + moved

    del mean
    out = jax.lax.map(one_level, (levels, jnp.moveaxis(columns, 2, 0)))  # [l, m, f, c]
    return jnp.moveaxis(out, 0, 2)


# ---- what the model says where the instruments look
def equivalents(
    truth: Truth,
    table: pd.DataFrame,
    times: np.ndarray | None = None,
    *,
    radiometers: Sequence[Sounder | GeoImager] = (),
    height_difference: float = np.inf,
) -> Float[np.ndarray, " n"]:
    """Values of a model (laid out as a `Truth`, at any truncation) in place of the reports of a canonical table.

    Where the model's ground is not the report's, its column goes on along its lowest line: surface pressure is that at
    the report's height by hydrostatics, the lowest level lies at the same share of that pressure, temperature is
    extrapolated linearly in ln(p), wind is constant. At the truth itself all this is the truth.

    Args:
      truth: the model.
      table: columns variable, latitude, longitude, height, pressure; for radiances also sensor, channel, view_angle.
      times: instead of the column `time`.
      radiometers: to know the channels by.
      height_difference: m; radiances over a ground further off than that are NaN.

    Returns:
      SI; NaN above the model's highest level and for unknown variables or sensors.
    """
    when = table["time"].to_numpy() if times is None else times
    place = [table[name].to_numpy(float) for name in ("latitude", "longitude", "height", "pressure")]
    variable = np.asarray(table["variable"].astype(object))
    out = np.full(len(table), np.nan)
    log_sigma = np.concatenate([[0.0], np.log(truth.sigma)])
    # Each place is looked at once for all its variables.
    surface = np.array([str(name).startswith(_LOW) or name == "surface_pressure" for name in variable], bool)
    for below in (True, False):
        rows = np.flatnonzero((surface if below else np.isin(variable, _UPPER)) & ~np.isnat(when))
        if not len(rows):
            continue
        keys = np.stack([when[rows].astype("int64").astype(float), *(x[rows] for x in place)], 1)
        keys[:, 3 if not below else 4] = 0.0
        _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        back, first = back.ravel(), rows[first]
        at = (when[first], place[0][first], place[1][first])
        pressure, temperature = profiles(truth, "temperature", *at)
        log_surface = np.log(pressure[:, 0])
        altitude = query(truth, ["surface_altitude"], *at)["surface_altitude"]
        heights = hydrostatic_heights(temperature, log_sigma, altitude)
        if below:
            ground = _position_of_height(place[2][first], heights, temperature, log_sigma)
            position = ground + log_sigma[1]
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                position = ground = np.log(place[3][first]) - log_surface
            position = np.where(position >= log_sigma[-1] - 1e-9, position, np.nan)
        for name in set(variable[rows].tolist()):
            here = variable[rows] == name
            which = back[here]
            if name == "surface_pressure":
                out[rows[here]] = np.exp(ground + log_surface)[which]
            elif name == "geopotential_height":
                out[rows[here]] = _height_at(position, heights, temperature, log_sigma)[which]
            elif name.endswith("temperature"):
                out[rows[here]] = _along(temperature, log_sigma, position)[which]
            else:
                _, wind = profiles(truth, name.removeprefix(_LOW), *at)
                out[rows[here]] = _along(wind, log_sigma, np.minimum(position, 0.0))[which]
    if (variable == _TB).any():
        sensors = np.asarray(table["sensor"].astype(object))
        for radiometer in radiometers:
            rows = np.flatnonzero((variable == _TB) & (sensors == radiometer.sensor))
            if len(rows):
                out[rows] = _radiances(truth, radiometer, table.iloc[rows], when[rows], height_difference)
    return out


def _radiances(
    truth: Truth, radiometer: Sounder | GeoImager, table: pd.DataFrame, when: np.ndarray, height_difference: float
) -> np.ndarray:
    latitude, longitude, height, view = (
        table[name].to_numpy(float) for name in ("latitude", "longitude", "height", "view_angle")
    )
    keys = np.stack([when.astype("int64").astype(float), latitude, longitude, view], 1)
    _, first, back = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    at = (when[first], latitude[first], longitude[first])
    pressure, temperature = profiles(truth, "temperature", *at)
    _, zenith = ground_arc(SENSORS[radiometer.sensor].altitude, np.abs(view[first]))
    all_channels = brightness_temperature(radiometer.channels, pressure, temperature, zenith)
    altitude = query(truth, ["surface_altitude"], *at)["surface_altitude"]
    all_channels[np.abs(altitude - height[first]) > height_difference] = np.nan
    numbers = [channel.channel.number for channel in radiometer.channels]
    column = pd.Index(numbers).get_indexer(table["channel"].to_numpy())
    return np.where(column >= 0, all_channels[back.ravel(), np.maximum(column, 0)], np.nan)


def _along(values: np.ndarray, nodes: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Profiles [N, K] at positions [N] in ln(sigma), linear between nodes and along the lowest line below them."""
    rows = np.arange(len(position))
    k = np.clip(np.searchsorted(-nodes, -np.nan_to_num(position), side="right") - 1, 0, len(nodes) - 2)
    share = (position - nodes[k]) / (nodes[k + 1] - nodes[k])
    return values[rows, k] + share * (values[rows, k + 1] - values[rows, k])


def _position_of_height(
    height: np.ndarray, heights: np.ndarray, temperature: np.ndarray, nodes: np.ndarray
) -> np.ndarray:
    """ln(sigma) of geopotential heights [N], as in `earth.osse.truth` but also below the ground."""
    rows = np.arange(len(height))
    k = np.clip((heights <= height[:, None]).sum(axis=1) - 1, 0, len(nodes) - 2)
    base = temperature[rows, k]
    slope = (temperature[rows, k + 1] - base) / (nodes[k + 1] - nodes[k])
    lift = (height - heights[rows, k]) * GRAVITY / GAS_CONSTANT
    root = np.sqrt(np.maximum(base**2 - 2.0 * slope * lift, 0.0))
    return nodes[k] - 2.0 * lift / (base + root)


def _height_at(position: np.ndarray, heights: np.ndarray, temperature: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Geopotential heights [N] of positions in ln(sigma): the trapezoid from the node below, also under the ground."""
    rows = np.arange(len(position))
    k = np.clip(np.searchsorted(-nodes, -np.nan_to_num(position), side="right") - 1, 0, len(nodes) - 2)
    here = _along(temperature, nodes, position)
    return heights[rows, k] + GAS_CONSTANT / GRAVITY * 0.5 * (temperature[rows, k] + here) * (nodes[k] - position)


# ---- ensembles
Ensemble = dict[str, np.ndarray]  # [member, sigma, longitude, latitude] of `_FIELDS`; surface pressure without sigma


def climate_members(cfg: LetkfConfig, *, cache: str | Path | None = None, progress: bool = True) -> Ensemble:
    """States of the forecast model's own climate at midnight, `member_days` apart: the first ensemble, which knows
    nothing of the weather.
    """
    days = cfg.members * cfg.member_days
    run = nature_run(dataclasses.replace(cfg.model, days=days, save_hours=24), cache=cache, progress=progress)
    some = run.isel(time=slice(cfg.member_days, None, cfg.member_days))
    return {name: np.swapaxes(some[name].values, -1, -2) for name in _FIELDS}


def as_truth(core: Core, states: Sequence[Mapping[str, np.ndarray]]) -> Truth:
    """Lays states (fields [sigma, longitude, latitude]) out for queries, the k-th one k hours after 2000-01-01."""
    dims = ("time", "sigma", "latitude", "longitude")
    data: dict[str, Any] = {}
    for name in _FIELDS:
        stacked = np.swapaxes(np.stack([np.asarray(state[name]) for state in states]), -1, -2)
        data[name] = (dims if stacked.ndim == 4 else (dims[0], *dims[2:]), stacked)
    data["surface_altitude"] = (dims[2:], core.surface_altitude)
    coords = {"time": _EPOCH + np.arange(len(states)) * _HOUR, "sigma": core.sigma}
    return truth_from_dataset(xr.Dataset(data, {**coords, "latitude": core.latitude, "longitude": core.longitude}))


@dataclasses.dataclass(frozen=True)
class Assimilation:
    """Result of `assimilate`.

    Attributes:
      analyses: initial time -> ensemble.
      diagnostics: one row per cycle and sensor with variable: time, sensor, variable, n (assimilated), n_rejected, rms
        and mean of the departures from the mean of the prior, spread (of the prior there) and error (assumed).
    """

    analyses: dict[np.datetime64, Ensemble]
    diagnostics: pd.DataFrame


def assimilate(
    table: pd.DataFrame,
    start: Any,
    inits: np.ndarray,
    members: Ensemble,
    cfg: LetkfConfig,
    *,
    radiometers: Sequence[Sounder | GeoImager] = (),
    core: Core | None = None,
    progress: bool = True,
) -> Assimilation:
    """Cycles the filter from `start` to the last initial time.

    Args:
      table: canonical table, without the held-out platforms.
      start: a midnight UTC, where `members` are taken to be valid.
      inits: times whose analyses are kept, on the filter's cycle after `start`.
      members: see `climate_members`.
      cfg: the filter.
      radiometers: those whose radiances are read.
      core: of `cfg.model`, when already compiled.

    Raises:
      LetkfError: initial times off the cycle, another number of members, a model that blew up.
    """
    core = dynamical_core(cfg.model) if core is None else core
    first = np.datetime64(start, "ns")
    wanted = np.asarray(inits, "datetime64[ns]")
    cycle = cfg.cycle_hours * _HOUR
    off = wanted[((wanted - first) % cycle != np.timedelta64(0)) | (wanted <= first)]
    if len(off) or not len(wanted):
        raise LetkfError(
            f"initial time {off[:1]} is not a multiple of {cfg.cycle_hours} h after {first}; choose others"
        )
    if first != first.astype("datetime64[D]"):
        raise LetkfError(f"start={first} must be a midnight: it fixes the sun")
    given = len(members["temperature"])
    if given != cfg.members:
        raise LetkfError(f"{given} members were given for members={cfg.members}")
    steps = cfg.cycle_hours // cfg.model.save_hours
    carries = [core.restore({name: x[m] for name, x in members.items()}, 0.0) for m in range(cfg.members)]
    times = table["time"].to_numpy()
    lat, lon = np.meshgrid(core.latitude, core.longitude, indexing="xy")  # [longitude, latitude]
    grid = np.asarray(unit_vector(lat.ravel(), lon.ravel(), xp=np))
    analyses: dict[np.datetime64, Ensemble] = {}
    rows = []
    count = int((wanted.max() - first) / cycle)
    for index in tqdm(range(count), desc="LETKF", unit="cycle", disable=not progress):
        begin = first + index * cycle
        states: list[list[Any]] = []
        for m in range(cfg.members):
            own = [core.diagnose(carries[m])]
            for _ in range(steps):
                carries[m] = core.advance(carries[m])
                own.append(core.diagnose(carries[m]))
            states.append([{name: np.asarray(x) for name, x in state.items()} for state in own])
        prior = {name: np.stack([own[-1][name] for own in states]) for name in _FIELDS}
        if not np.isfinite(prior["temperature"]).all():
            raise LetkfError(f"a member blew up before {begin + cycle}; raise inflation less or halve dt_minutes")
        low, high = np.searchsorted(times, [begin, begin + cycle], side="right")
        some = table.iloc[low:high]
        seen_from_space = (some["variable"] == _TB).to_numpy()
        kept = [thin(some[~seen_from_space], cfg.thin_km), thin(some[seen_from_space], cfg.thin_radiances_km)]
        some: Any = pd.concat(kept, ignore_index=True)
        truth = as_truth(core, [state for own in states for state in own])
        # A made-up clock: a member's states follow each other by one hour, member after member.
        share = (some["time"].to_numpy() - begin) / (cfg.model.save_hours * _HOUR)
        seen = np.stack(
            [
                equivalents(
                    truth,
                    some,
                    _EPOCH + ((m * (steps + 1) + share) * 3.6e12).astype("timedelta64[ns]"),
                    radiometers=radiometers,
                    height_difference=cfg.height_difference,
                )
                for m in range(cfg.members)
            ],
            1,
        )
        posterior, report = _update(core, cfg, prior, some, seen, grid, radiometers)
        order = np.random.default_rng([cfg.seed, index]).permutation(cfg.members)
        for name, x in members.items():
            posterior[name] = posterior[name] + cfg.additive * (x - x.mean(0))[order]
        rows.append(report.assign(time=begin + cycle))
        hour = float(((begin + cycle) - first) / _HOUR % 24)
        carries = [core.restore({name: x[m] for name, x in posterior.items()}, hour) for m in range(cfg.members)]
        if begin + cycle in wanted:
            analyses[begin + cycle] = posterior
    return Assimilation(analyses, pd.concat(rows, ignore_index=True))


def _update(
    core: Core,
    cfg: LetkfConfig,
    prior: Ensemble,
    some: pd.DataFrame,
    seen: np.ndarray,
    grid: np.ndarray,
    radiometers: Sequence[Sounder | GeoImager],
) -> tuple[Ensemble, pd.DataFrame]:
    """Analysis of one cycle, and its row of diagnostics."""
    names = np.asarray(some["variable"].astype(object))
    extra = np.array([_UNRESOLVED.get(str(name), np.nan) for name in names], float)
    variance = some["obs_error"].to_numpy(float) ** 2 + (cfg.unresolved * extra) ** 2
    centre, prior_variance = seen.mean(1), seen.var(1, ddof=1)
    departure = some["value"].to_numpy(float) - centre
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(departure) & np.isfinite(variance)
        good = usable & (departure**2 <= cfg.gross**2 * (prior_variance + variance))
    report = pd.DataFrame(
        {
            "sensor": np.asarray(some["sensor"].astype(object)),
            "variable": names,
            "n": good.astype(int),
            "n_rejected": 1 - good.astype(int),
            "departure": np.where(good, departure, np.nan),
            "square": np.where(good, departure**2, np.nan),
            "spread": np.where(good, prior_variance, np.nan),
            "error": np.where(good, variance, np.nan),
        }
    )
    grouped: Any = report.groupby(["sensor", "variable"], sort=True)
    summary = grouped.agg(
        n=("n", "sum"),
        n_rejected=("n_rejected", "sum"),
        rms=("square", "mean"),
        mean=("departure", "mean"),
        spread=("spread", "mean"),
        error=("error", "mean"),
    ).reset_index()
    for name in ("rms", "spread", "error"):
        summary[name] = np.sqrt(summary[name])
    rows = np.flatnonzero(good)
    if not len(rows):
        return prior, summary
    nearest, horizontal = _neighbours(cfg, some.iloc[rows], grid)
    surface = prior["surface_pressure"].reshape(cfg.members, -1)
    columns = np.stack(
        [
            *(prior[name].reshape(cfg.members, len(core.sigma), -1) for name in _FIELDS[:3]),
            np.broadcast_to(surface[:, None], (cfg.members, len(core.sigma), surface.shape[1])),
        ],
        1,
    )
    # Padded to few lengths, for each is compiled anew; nothing points at the padding.
    more = -len(rows) % _PADDED
    observed = [seen[rows], departure[rows], variance[rows], _levels(some.iloc[rows], radiometers)]
    padded = [np.pad(x, ((0, more),) + ((0, 0),) * (x.ndim - 1), constant_values=1.0) for x in observed]
    levels = np.log(core.sigma)[:, None] + np.log(surface.mean(0))
    after = analyse(
        *(jnp.asarray(x, jnp.float32) for x in (columns, *padded)),
        jnp.asarray(nearest, jnp.int32),
        jnp.asarray(horizontal, jnp.float32),
        jnp.asarray(levels, jnp.float32),
        cfg.depth,
        cfg.inflation,
        cfg.relaxation,
    )
    result = np.asarray(after)
    posterior = {name: result[:, i].reshape(prior[name].shape) for i, name in enumerate(_FIELDS[:3])}
    posterior["surface_pressure"] = result[:, 3, -1].reshape(prior["surface_pressure"].shape)  # the lowest level's
    return posterior, summary


def _neighbours(cfg: LetkfConfig, some: pd.DataFrame, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest observations [column, k] and their horizontal localisation.

    The count is always the same, so that one program serves all cycles; missing ones have weight 0.

    """
    place = np.asarray(unit_vector(some["latitude"].to_numpy(float), some["longitude"].to_numpy(float), xp=np))
    distance = _RADIUS * np.arccos(np.clip(grid @ place.T, -1, 1))
    count = min(cfg.neighbours, len(some))
    nearest = np.argpartition(distance, count - 1, axis=1)[:, :count]
    near = np.take_along_axis(distance, nearest, 1)
    weight = (
        np.ones_like(near) if np.isinf(cfg.radius_km) else np.asarray(gaspari_cohn(jnp.asarray(near / cfg.radius_km)))
    )
    missing = cfg.neighbours - count
    return np.pad(nearest, ((0, 0), (0, missing))), np.pad(weight, ((0, 0), (0, missing)))


def _levels(some: pd.DataFrame, radiometers: Sequence[Sounder | GeoImager]) -> np.ndarray:
    """ln(p) at which each observation is taken to be: a radiance at the peak of its channel, above 900 hPa."""
    height = np.nan_to_num(some["height"].to_numpy(float))
    pressure = some["pressure"].to_numpy(float)
    out = np.log(np.where(np.isfinite(pressure), pressure, 0.94 * standard_pressure(height)))
    variable, sensor = (np.asarray(some[name].astype(object)) for name in ("variable", "sensor"))
    for radiometer in radiometers:
        for channel in radiometer.channels:
            here = (variable == _TB) & (sensor == radiometer.sensor)
            here &= some["channel"].to_numpy() == channel.channel.number
            out[here] = np.log(min(channel.depth_pressure, 9e4))
    return out


def thin(table: pd.DataFrame, kilometres: float) -> pd.DataFrame:
    """The newest value of each platform, variable, channel and layer of 0.2 in ln(p) in boxes of equal angle; fixed
    platforms are boxes of their own.
    """
    if kilometres <= 0 or not len(table):
        return table
    degrees = kilometres / 111.2
    latitude = table["latitude"].to_numpy(float)
    row = np.floor(latitude / degrees)
    around = np.cos(np.deg2rad(np.clip((row + 0.5) * degrees, -85, 85)))
    column = np.floor(table["longitude"].to_numpy(float) % 360 * around / degrees)
    with np.errstate(invalid="ignore", divide="ignore"):
        layer = np.floor(np.log(table["pressure"].to_numpy(float)) / 0.2)
    keys = pd.DataFrame(
        {
            "platform": pd.factorize(table["platform"])[0],
            "variable": pd.factorize(table["variable"])[0],
            "channel": table["channel"].to_numpy(),
            "row": row,
            "column": column,
            "layer": np.nan_to_num(layer, nan=-1.0),
        }
    )
    return table.loc[~keys.duplicated(keep="last").to_numpy()]


def forecast(
    analyses: Mapping[np.datetime64, Ensemble],
    start: Any,
    wanted: pd.DataFrame,
    cfg: LetkfConfig,
    *,
    core: Core | None = None,
    progress: bool = True,
) -> Float[np.ndarray, " n"]:
    """Forecasts at targets from analyses.

    Args:
      analyses: of `assimilate`.
      start: the midnight that `assimilate` started from.
      wanted: targets of `earth.osse.verification`; leads are multiples of `cfg.model.save_hours`.
      cfg: the filter.
      core: of `cfg.model`, when already compiled.

    Returns:
      SI; NaN for initial times without an analysis and for variables that the model does not carry.
    """
    core = dynamical_core(cfg.model) if core is None else core
    out = np.full(len(wanted), np.nan)
    lead = wanted["lead_time"].to_numpy(int)
    leads = np.unique(lead)
    if (leads % cfg.model.save_hours).any():
        raise LetkfError(f"leads {leads.tolist()} h are not multiples of save_hours={cfg.model.save_hours}")
    init = wanted["init_time"].to_numpy("datetime64[ns]")
    for when in tqdm(sorted(set(init.tolist()) & {int(t.astype("int64")) for t in analyses}), disable=not progress):
        moment = np.datetime64(when, "ns")
        ensemble = analyses[moment]
        hour = float((moment - np.datetime64(start, "ns")) / _HOUR % 24)
        if cfg.ensemble_forecast:
            runs = [{name: x[m] for name, x in ensemble.items()} for m in range(cfg.members)]
        else:
            runs = [{name: x.mean(0) for name, x in ensemble.items()}]
        rows = np.flatnonzero(init == moment)
        clock = _EPOCH + np.searchsorted(leads, lead[rows]) * _HOUR
        total = np.zeros(len(rows))
        for run in runs:
            carry = core.restore(run, hour)
            states, reached = [], 0
            for hours in leads:
                for _ in range((int(hours) - reached) // cfg.model.save_hours):
                    carry = core.advance(carry)
                reached = int(hours)
                states.append({name: np.asarray(x) for name, x in core.diagnose(carry).items()})
            total += equivalents(as_truth(core, states), wanted.iloc[rows], clock)
        out[rows] = total / len(runs)
    return out
