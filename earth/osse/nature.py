"""Nature runs: the simulated atmosphere that an observing-system simulation experiment (OSSE) takes for the truth.

The atmosphere is the spectral primitive-equation core of dinosaur-dycore 1.2.1 (extra `osse`) under the forcing of Held
and Suarez (1994, Bull. Amer. Meteor. Soc. 75, 1825-1830): Newtonian relaxation of temperature and Rayleigh drag below
sigma 0.7.

What this truth is not, and no result on it may be read as if it were:
- **Dry**: no water, clouds, rain or radiation.
- **Zonally symmetric and perpetual**: Held-Suarez knows no continents, mountains, seasons, sun or **diurnal cycle**. It
  is a perpetual equinox over a flat planet, and the calendar of its time axis is a label.
- **No surface layer**: the lowest level is the centre of the lowest sigma layer (sigma 0.9375 for 8 layers, some 500 m
  above the ground), so there is no 2 m temperature and no 10 m wind.
- **Coarse**: T21 (64 x 32 points, 5.6 degrees) by default; nothing smaller than about 1,000 km is resolved.

Three additions to Held-Suarez are ours and off by default. The first two act inside the dynamics, so the flow feels
them and stays consistent with them; none is painted on the output:
- `relief_height`: three smooth mountain ranges (`relief`), spectrally truncated; initial pressure in exact hydrostatic
  balance.
- `diurnal_amplitude`: a heating of zero daily mean that travels with the sun, strongest over two smooth "continents"
  (`continentality`), confined to sigma > 0.7, applied after each time step (first-order splitting).
- `moisture`: specific humidity as a tracer that the flow carries and does not feel. After each time step the lowest
  layer is drawn towards 80 % of saturation, within 2 days over the sea and more slowly over land, and what exceeds
  saturation anywhere falls out. No latent heat, clouds or convection.

A run is a function of its `NatureConfig` alone. float32 on a CPU repeats bit for bit on one machine and one jax
version; another machine, or a GPU, gives another trajectory of the same climate, because the flow is chaotic.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

GRAVITY = 9.80616  # m s-2, dinosaur's
GAS_CONSTANT = 1004.0 * 2.0 / 7.0  # J kg-1 K-1, dry air, dinosaur's

_FORMAT = 1  # in every fingerprint: raise it when the code changes what a config, or a digest, means
_P0 = 1e5  # Pa, Held-Suarez reference surface pressure
_T_REF = 288.0  # K, dinosaur's isothermal initial and reference temperature
_SIGMA_B = 0.7  # top of the Held-Suarez boundary layer
_DT_MINUTES = {15: 60.0, 21: 30.0, 31: 30.0, 42: 20.0}  # stable: T21 ran 240 days here with 2 km relief
_NODES = {15: 12, 21: 16, 31: 24, 42: 32}  # Gaussian latitudes of a hemisphere; the last three are dinosaur's
_BLOCK_DAYS = 10  # days held in memory before they are appended to the cache

_VARIABLES = {
    "temperature": ("air_temperature", "K"),
    "u_component_of_wind": ("eastward_wind", "m s-1"),
    "v_component_of_wind": ("northward_wind", "m s-1"),
    "surface_pressure": ("surface_air_pressure", "Pa"),
    "specific_humidity": ("specific_humidity", "1"),
}
_EVAPORATION_DAYS = 2.0  # over the sea
_LAND_EVAPORATION = 0.3  # of the sea's, at the heart of a continent


class OsseError(ValueError):
    """Base of the typed errors of `earth.osse`."""


class NatureConfigError(OsseError):
    """A `NatureConfig` that cannot be run."""


class NatureRunError(OsseError):
    """The integration left the range of finite numbers."""


class NatureCacheError(OsseError):
    """A cached nature run that is damaged or belongs to another config."""


class DinosaurMissingError(ImportError):
    """dinosaur-dycore is not installed."""


@dataclasses.dataclass(frozen=True)
class NatureConfig:
    """Everything a nature run depends on.

    Attributes:
      truncation: triangular truncation, 15, 21, 31 or 42 (48 x 24, 64 x 32, 96 x 48, 128 x 64 points). 15 is for a
        forecast model that is coarser than its truth.
      layers: equidistant sigma layers.
      dt_minutes: time step; None takes 60 min at T15, 30 min at T21 and T31, 20 min at T42.
      spin_up_days: days thrown away before `start`. From rest the flow needs about 150; fewer give a run that is still
        adjusting.
      days: days kept.
      save_hours: interval of the kept states, a divisor of 24. Both ends are kept: `days * 24 / save_hours + 1` states.
      start: UTC time of the first kept state; a label, for the forcing has no seasons (it must be midnight, which fixes
        the sun).
      seed: seed of the initial surface-pressure perturbation, hence of the whole chaotic trajectory.
      perturbation: amplitude of that perturbation, Pa (a wave packet; T21 keeps about a third of it at its peak).
      relief_height: highest summit in m, 0 for the flat planet of Held-Suarez.
      diurnal_amplitude: nominal diurnal temperature amplitude of the lowest layer over a continent in K, 0 for none.
      moisture: carry specific humidity, dry at first; the flow does not feel it.
    """

    truncation: int = 21
    layers: int = 8
    dt_minutes: float | None = None
    spin_up_days: int = 150
    days: int = 60
    save_hours: int = 6
    start: str = "2000-01-01T00:00"
    seed: int = 0
    perturbation: float = 5e3
    relief_height: float = 0.0
    diurnal_amplitude: float = 0.0
    moisture: bool = False

    def __post_init__(self):
        if self.truncation not in _DT_MINUTES:
            raise NatureConfigError(f"truncation={self.truncation} is not one of {sorted(_DT_MINUTES)}")
        if self.layers < 4:
            raise NatureConfigError(f"layers={self.layers} cannot carry a baroclinic flow; take at least 4")
        if self.spin_up_days < 0 or self.days < 1:
            raise NatureConfigError(f"spin_up_days={self.spin_up_days} and days={self.days} must be at least 0 and 1")
        if self.save_hours < 1 or 24 % self.save_hours:
            raise NatureConfigError(f"save_hours={self.save_hours} must divide 24")
        if self.step_minutes <= 0 or not (self.save_hours * 60 / self.step_minutes).is_integer():
            raise NatureConfigError(
                f"save_hours={self.save_hours} is not a whole number of steps of dt_minutes={self.step_minutes}"
            )
        if not 0 <= self.relief_height <= 4000 or not 0 <= self.diurnal_amplitude <= 10:
            raise NatureConfigError(
                f"relief_height={self.relief_height} m and diurnal_amplitude={self.diurnal_amplitude} K must lie in "
                "[0, 4000] and [0, 10]: the core is not stable, or not sensible, beyond"
            )
        if not 0 <= self.seed < 2**32:
            raise NatureConfigError(f"seed={self.seed} must lie in [0, 2**32)")
        try:
            midnight = np.datetime64(self.start, "ns") == np.datetime64(self.start, "D")
        except ValueError as error:
            raise NatureConfigError(f"start={self.start!r} is no ISO 8601 time without a zone") from error
        if not midnight:
            raise NatureConfigError(f"start={self.start!r} must be a midnight UTC, e.g. '2000-01-01T00:00'")

    @property
    def step_minutes(self) -> float:
        return _DT_MINUTES[self.truncation] if self.dt_minutes is None else float(self.dt_minutes)

    @property
    def times(self) -> np.ndarray:
        """Times of the kept states, datetime64[ns] [days * 24 / save_hours + 1]."""
        count = self.days * 24 // self.save_hours + 1
        return np.datetime64(self.start, "ns") + np.arange(count) * np.timedelta64(self.save_hours, "h")

    def fingerprint(self) -> str:
        """16 hex digits that change whenever a field, the dycore's version or the meaning of a config changes."""
        content = {**dataclasses.asdict(self), "dt_minutes": self.step_minutes, "format": _FORMAT}
        content["dycore"] = "dinosaur-dycore 1.2.1"
        if not self.moisture:
            del content["moisture"]  # runs older than the field keep their names
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def nature_run(config: NatureConfig, *, cache: str | Path | None = None, progress: bool = True) -> xr.Dataset:
    """Runs the nature run of `config`, or reads it from `cache`.

    Args:
      config: what to run.
      cache: folder for finished runs (made if absent), or None to keep nothing. A run lies in
        `nature-<fingerprint>.zarr`; it is written to a hidden temporary name and renamed when complete, so a killed run
        never looks like a finished one.
      progress: show a progress bar in days.

    Returns:
      Dataset in memory with dims (time, sigma, latitude, longitude), float32, SI units, CF attributes: `temperature`,
      `u_component_of_wind`, `v_component_of_wind`, `specific_humidity` with `moisture`, `surface_pressure` [time,
      latitude, longitude] and `surface_altitude` [latitude, longitude]. Latitude ascends over the Gaussian grid (no
      poles), longitude is in [0, 360), sigma ascends (top first).

    Raises:
      DinosaurMissingError: dinosaur-dycore is missing and the run is not cached.
      NatureRunError: the flow blew up.
      NatureCacheError: the cached run is damaged.
    """
    if cache is None:
        blocks = list(_integrate(config, progress))
        return _describe(xr.concat(blocks, "time", data_vars="minimal"), config)
    path = Path(cache) / f"nature-{config.fingerprint()}.zarr"
    if not path.exists():
        _write(path, config, progress)
    return read_nature(path, config)


def read_nature(path: str | Path, config: NatureConfig | None = None) -> xr.Dataset:
    """Reads a finished nature run into memory and checks every byte of it against its recorded digest.

    Args:
      path: a `nature-*.zarr` folder written by `nature_run`.
      config: when given, the run must be of this config.

    Raises:
      NatureCacheError: not a finished run, of another config, or changed since it was written.
    """
    path = Path(path)
    remedy = f"delete {path} and run again"
    try:
        dataset = xr.open_zarr(path, consolidated=False, chunks=None).load()
    except Exception as error:  # zarr raises a dozen types for a damaged store
        raise NatureCacheError(f"{path} is not a readable nature run ({error}); {remedy}") from error
    if "digest" not in dataset.attrs:
        raise NatureCacheError(f"{path} carries no digest: it was not finished; {remedy}")
    if config is not None and dataset.attrs.get("fingerprint") != config.fingerprint():
        raise NatureCacheError(
            f"{path} has fingerprint {dataset.attrs.get('fingerprint')}, the config {config.fingerprint()}; {remedy}"
        )
    digest = _Digest()
    digest.update(dataset)
    if digest.hexdigest() != dataset.attrs["digest"]:
        raise NatureCacheError(f"{path} does not match its digest: a file in it is damaged or missing; {remedy}")
    return dataset


def caveats(config: NatureConfig) -> tuple[str, ...]:
    """What a result on this nature run cannot show, as phrases to print with it."""
    added = [
        text
        for text, present in (
            (f"idealised mountains up to {config.relief_height:g} m", config.relief_height > 0),
            (f"an idealised diurnal heating of about {config.diurnal_amplitude:g} K", config.diurnal_amplitude > 0),
            ("specific humidity as a tracer without latent heat or convection", config.moisture),
        )
        if present
    ]
    return (
        "simulated atmosphere: a dry Held-Suarez dynamical core without water, clouds, radiation or seasons",
        f"added to Held-Suarez by us: {' and '.join(added)}"
        if added
        else "flat planet, no continents, no diurnal cycle",
        "no surface layer: lowest_level values belong to the middle of the lowest model layer, not to 2 m or 10 m",
        f"smooth truth (T{config.truncation}): observations carry no representativeness error of smaller scales",
    )


def relief(latitude: np.ndarray, longitude: np.ndarray, height: float) -> np.ndarray:
    """Three smooth mountain ranges (ours), in m; shape of the broadcast arguments in degrees.

    Bumps exp(16 (cos d - 1)) of the great-circle distance d, 14 degrees wide: smooth enough for T21 to carry without
    ripples. Summits of 1, 0.7 and 0.6 times `height` at 35N 90E, 45N 250E and 20S 290E.
    """
    summits = ((35.0, 90.0, 1.0), (45.0, 250.0, 0.7), (-20.0, 290.0, 0.6))
    lat, lon = np.deg2rad(latitude), np.deg2rad(longitude)
    total = np.zeros(np.broadcast_shapes(np.shape(lat), np.shape(lon)))
    for lat0, lon0, share in summits:
        lat0, lon0 = math.radians(lat0), math.radians(lon0)
        cosine = np.sin(lat) * math.sin(lat0) + np.cos(lat) * math.cos(lat0) * np.cos(lon - lon0)
        total = total + share * np.exp(16.0 * (cosine - 1.0))
    return height * total


def continentality(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Smooth "land share" in [0, 1] (ours): two continents centred on 90E and 270E, none at the poles."""
    return np.sin(np.deg2rad(longitude)) ** 2 * np.cos(np.deg2rad(latitude)) ** 2


@dataclasses.dataclass(frozen=True)
class Core:
    """A compiled model: `advance` goes one save interval, `diagnose` turns its carry into SI fields [.., longitude,
    latitude], `restore` turns such fields and the hour of the day into a carry. All three may be mapped over members.
    """

    carry: Any
    advance: Callable[[Any], Any]
    diagnose: Callable[[Any], dict[str, Any]]
    restore: Callable[[dict[str, Any], Any], Any]
    latitude: np.ndarray
    longitude: np.ndarray
    sigma: np.ndarray
    surface_altitude: np.ndarray  # [latitude, longitude]


def dynamical_core(config: NatureConfig) -> Core:
    """The model of a nature run, at its initial state.

    Raises:
      DinosaurMissingError: dinosaur-dycore is missing.
    """
    try:
        with warnings.catch_warnings():
            # dinosaur 1.2.1 reads jax.experimental.shard_map, deprecated since jax 0.8; it matters only when sharding.
            warnings.simplefilter("ignore", DeprecationWarning)
            from dinosaur import (
                coordinate_systems,
                held_suarez,
                primitive_equations,
                primitive_equations_states,
                scales,
                sigma_coordinates,
                spherical_harmonic,
                time_integration,
                xarray_utils,
            )
    except ImportError as error:
        raise DinosaurMissingError(
            "the nature run needs dinosaur-dycore 1.2.1; install it with: pip install earthmoe[osse]"
        ) from error
    import jax
    import jax.numpy as jnp

    units = scales.units
    grid = spherical_harmonic.Grid.construct(config.truncation, _NODES[config.truncation])
    coords = coordinate_systems.CoordinateSystem(grid, sigma_coordinates.SigmaCoordinates.equidistant(config.layers))
    specs = primitive_equations.PrimitiveEquationsSpecs.from_si()
    p0 = _P0 * units.pascal
    initial, aux = primitive_equations_states.isothermal_rest_atmosphere(
        coords=coords, physics_specs=specs, tref=_T_REF * units.degK, p0=p0, p1=config.perturbation * units.pascal
    )
    reference = aux[xarray_utils.REF_TEMP_KEY]
    longitude = np.rad2deg(grid.nodal_axes[0])
    latitude = np.rad2deg(np.arcsin(grid.nodal_axes[1]))

    mountains = relief(latitude[None, :], longitude[:, None], config.relief_height) * units.meter
    orography = primitive_equations.truncated_modal_orography(np.asarray(specs.nondimensionalize(mountains)), coords)
    state = initial(jax.random.PRNGKey(config.seed))
    # An isothermal atmosphere at rest has ln ps = ln p0 - g z / (R T): balanced to rounding, for every term is linear
    # and modal.
    state = dataclasses.replace(
        state, log_surface_pressure=state.log_surface_pressure - specs.g / (specs.R * _T_REF) * orography
    )

    class Forcing(held_suarez.HeldSuarezForcing):
        def explicit_terms(self, state):
            tendency = super().explicit_terms(state)  # leaves tracers out, which the sum of the equations needs
            return dataclasses.replace(tendency, tracers=jax.tree.map(jnp.zeros_like, state.tracers))

    equation = time_integration.compose_equations(
        [
            primitive_equations.PrimitiveEquations(reference, orography, coords, specs),
            Forcing(coords=coords, physics_specs=specs, reference_temperature=reference, p0=p0),
        ]
    )
    dt: Any = specs.nondimensionalize(config.step_minutes * units.minute)
    # Filter of dinosaur's Held-Suarez notebook: 60 s e-folding of the shortest waves, none below 0.8 of the truncation.
    order: Any = 1.5  # annotated int there, used as a float
    dissipation = time_integration.exponential_step_filter(grid, dt, tau=0.0087504, order=order, cutoff=0.8)
    step = time_integration.step_with_filters(time_integration.imex_rk_sil3(equation, dt), [dissipation])

    sigma = np.asarray(coords.vertical.centers)
    heating = _diurnal_heating(config, latitude, longitude, sigma)
    heat_cos, heat_sin = (grid.to_modal(jnp.asarray(part, jnp.float32)) for part in heating)
    steps_per_day = round(24 * 60 / config.step_minutes)
    if config.moisture:
        state = dataclasses.replace(
            state, tracers={"specific_humidity": jnp.zeros_like(jnp.asarray(state.temperature_variation))}
        )
    evaporated = _evaporation(config, latitude, longitude)
    log_p0 = float(np.log(specs.nondimensionalize(p0)))

    def temperature_and_pressure(state):
        temperature = grid.to_nodal(state.temperature_variation) + jnp.asarray(reference)[:, None, None]
        return temperature, _P0 * jnp.exp(grid.to_nodal(state.log_surface_pressure)[0] - log_p0)

    def one_step(carry, _):
        state, count = carry
        state = step(state)
        if config.diurnal_amplitude:
            angle = 2 * jnp.pi * (count.astype(jnp.float32) + 0.5) / steps_per_day
            warming = jnp.cos(angle) * heat_cos + jnp.sin(angle) * heat_sin  # [sigma, modal, modal] K per step
            state = dataclasses.replace(state, temperature_variation=state.temperature_variation + warming)
        if config.moisture:
            temperature, surface = temperature_and_pressure(state)
            limit = saturation(temperature, sigma[:, None, None] * surface)
            humidity = jnp.maximum(grid.to_nodal(state.tracers["specific_humidity"]), 0.0)
            gain = evaporated * jnp.maximum(0.8 * limit[-1] - humidity[-1], 0.0)
            humidity = jnp.minimum(humidity.at[-1].add(gain), limit)
            state = dataclasses.replace(state, tracers={"specific_humidity": grid.to_modal(humidity)})
        return (state, (count + 1) % steps_per_day), None

    @jax.jit
    def advance(carry):
        return jax.lax.scan(one_step, carry, None, length=round(config.save_hours * 60 / config.step_minutes))[0]

    speed = float(specs.dimensionalize(1.0, units.meter / units.second).magnitude)

    @jax.jit
    def diagnose(carry):
        state, _ = carry
        u, v = spherical_harmonic.vor_div_to_uv_nodal(grid, state.vorticity, state.divergence)
        temperature, surface = temperature_and_pressure(state)

        def within_saturation(humidity):  # beyond it lie the ripples of the truncation
            return jnp.clip(humidity, 0.0, saturation(temperature, sigma[:, None, None] * surface))

        return {
            "temperature": temperature,
            "u_component_of_wind": speed * u,
            "v_component_of_wind": speed * v,
            "surface_pressure": surface,
            **{name: within_saturation(grid.to_nodal(tracer)) for name, tracer in state.tracers.items()},
        }

    @jax.jit
    def restore(fields, hour):
        vorticity, divergence = spherical_harmonic.uv_nodal_to_vor_div_modal(
            grid, fields["u_component_of_wind"] / speed, fields["v_component_of_wind"] / speed
        )
        variation = fields["temperature"] - jnp.asarray(reference)[:, None, None]
        log_surface = jnp.log(fields["surface_pressure"] / _P0)[None] + log_p0
        restored = dataclasses.replace(
            state,
            vorticity=vorticity,
            divergence=divergence,
            temperature_variation=grid.clip_wavenumbers(grid.to_modal(variation)),
            log_surface_pressure=grid.clip_wavenumbers(grid.to_modal(log_surface)),
            tracers={name: grid.clip_wavenumbers(grid.to_modal(fields[name])) for name in state.tracers},
        )
        count = jnp.asarray(jnp.rint(hour * 60 / config.step_minutes), jnp.int32) % steps_per_day
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), (restored, count), _dtypes)

    _dtypes = jax.tree.map(jnp.asarray, (state, jnp.zeros((), jnp.int32)))
    metre = float(specs.dimensionalize(1.0, units.meter).magnitude)
    return Core(
        carry=(state, jnp.zeros((), jnp.int32)),
        advance=advance,
        diagnose=diagnose,
        restore=restore,
        latitude=latitude,
        longitude=longitude,
        sigma=sigma,
        surface_altitude=metre * np.asarray(grid.to_nodal(orography)).T,
    )


def saturation(temperature: Any, pressure: Any) -> Any:
    """Specific humidity of saturated air over water, kg/kg, from K and Pa (Bolton 1980, Mon. Wea. Rev. 108, eq. 10).

    The vapour pressure is cut at half the pressure: hot thin air has no saturation.
    """
    import jax.numpy as jnp

    vapour = 611.2 * jnp.exp(17.67 * (temperature - 273.15) / (temperature - 29.65))
    vapour = jnp.minimum(vapour, 0.5 * pressure)
    return 0.622 * vapour / (pressure - 0.378 * vapour)


def _evaporation(config: NatureConfig, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Share [longitude, latitude] of the lowest layer's deficit that evaporates in one time step."""
    land = continentality(latitude[None, :], longitude[:, None])
    speed = (1 - (1 - _LAND_EVAPORATION) * land) / _EVAPORATION_DAYS
    return 1 - np.exp(-speed * config.step_minutes / (24 * 60))


def _diurnal_heating(
    config: NatureConfig, latitude: np.ndarray, longitude: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Heating per time step in K as parts of cos and sin of 2 pi t / day, each [sigma, longitude, latitude].

    dT/dt = A w(sigma) C(lat, lon) (2 pi / day) cos(H + pi / 4), H the local hour angle from noon: unopposed, it gives
    A w C sin(H + pi / 4), warmest at 15 h local solar time. w falls linearly from 1 in the lowest layer to 0 at sigma
    0.7.
    """
    depth = np.maximum(0.0, sigma - _SIGMA_B) / (sigma[-1] - _SIGMA_B)
    pattern = depth[:, None, None] * continentality(latitude[None, :], longitude[:, None])
    per_step = config.diurnal_amplitude * 2 * math.pi * config.step_minutes / (24 * 60)
    phase = np.deg2rad(longitude)[None, :, None] - math.pi + math.pi / 4  # H + pi / 4 = 2 pi t / day + phase
    return per_step * pattern * np.cos(phase), -per_step * pattern * np.sin(phase)


def _integrate(config: NatureConfig, progress: bool) -> Iterator[xr.Dataset]:
    """Yields the kept states in blocks of `_BLOCK_DAYS` days."""
    from tqdm import tqdm

    core = dynamical_core(config)
    carry, per_day = core.carry, 24 // config.save_hours
    times = config.times
    kept: list[dict[str, np.ndarray]] = []
    first = 0  # index of kept[0]
    with tqdm(total=config.spin_up_days + config.days, desc="nature run", unit="day", disable=not progress) as bar:
        for day in range(config.spin_up_days):
            for _ in range(per_day):
                carry = core.advance(carry)
            _check_finite(carry, day - config.spin_up_days)
            bar.update()
        for index in range(len(times)):
            if index:
                carry = core.advance(carry)
            fields = core.diagnose(carry).items()
            kept.append({name: np.swapaxes(np.asarray(x), -1, -2).astype(np.float32) for name, x in fields})
            if index and index % per_day == 0:
                _check_finite(carry, index // per_day - 1)
                bar.update()
            if len(kept) == _BLOCK_DAYS * per_day or index == len(times) - 1:
                yield _block(core, times[first : index + 1], kept)
                first, kept = index + 1, []


def _check_finite(carry: Any, day: int) -> None:
    if not np.isfinite(np.asarray(carry[0].temperature_variation)).all():
        raise NatureRunError(
            f"the nature run blew up on day {day} (day 0 is the first kept one); "
            "halve dt_minutes or lower relief_height"
        )


def _present(fields: Container[str]) -> list[str]:
    return [name for name in _VARIABLES if name in fields]


def _block(core: Core, times: np.ndarray, kept: list[dict[str, np.ndarray]]) -> xr.Dataset:
    data: dict[str, Any] = {}
    for name in _present(kept[0]):
        dims = (
            ("time", "sigma", "latitude", "longitude") if kept[0][name].ndim == 3 else ("time", "latitude", "longitude")
        )
        data[name] = (dims, np.stack([state[name] for state in kept]))
    data["surface_altitude"] = (("latitude", "longitude"), core.surface_altitude.astype(np.float32))
    coords = {"time": times, "sigma": core.sigma, "latitude": core.latitude, "longitude": core.longitude}
    return xr.Dataset(data, coords)


def _describe(dataset: xr.Dataset, config: NatureConfig) -> xr.Dataset:
    """Adds the CF attributes and what the run is."""
    for name in _present(dataset):
        standard_name, units = _VARIABLES[name]
        dataset[name].attrs = {"standard_name": standard_name, "units": units}
    dataset["surface_altitude"].attrs = {"standard_name": "surface_altitude", "units": "m"}
    dataset["latitude"].attrs = {"standard_name": "latitude", "units": "degrees_north"}
    dataset["longitude"].attrs = {"standard_name": "longitude", "units": "degrees_east"}
    dataset["sigma"].attrs = {"standard_name": "atmosphere_sigma_coordinate", "units": "1", "positive": "down"}
    dataset["time"].attrs = {"standard_name": "time"}
    dataset.attrs = {
        "Conventions": "CF-1.11",
        "title": f"Held-Suarez nature run T{config.truncation}L{config.layers}",
        "source": "dinosaur-dycore 1.2.1",
        "references": "Held and Suarez 1994, Bull. Amer. Meteor. Soc. 75, 1825-1830",
        "comment": "; ".join(caveats(config)),
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "fingerprint": config.fingerprint(),
    }
    return dataset


class _Digest:
    """sha256 over names, lengths and bytes of all fields, the same for a run in blocks and for the whole run."""

    def __init__(self) -> None:
        self._series: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}
        self._static = ""

    def update(self, block: xr.Dataset) -> None:
        if not self._series:
            self._series = {name: hashlib.sha256() for name in (*_present(block), "time")}
            self._lengths = dict.fromkeys(self._series, 0)
        for name, series in self._series.items():
            values = np.ascontiguousarray(block[name].values)
            series.update(values.tobytes())
            self._lengths[name] += len(values)
        static = hashlib.sha256()
        for name in ("surface_altitude", "latitude", "longitude", "sigma"):
            static.update(np.ascontiguousarray(block[name].values).tobytes())
        self._static = static.hexdigest()

    def hexdigest(self) -> str:
        parts = [f"{name} {self._lengths[name]} {series.hexdigest()}" for name, series in self._series.items()]
        return hashlib.sha256(" ".join([*parts, self._static]).encode()).hexdigest()


def _write(path: Path, config: NatureConfig, progress: bool) -> None:
    """Runs and writes `path` through a temporary folder beside it."""
    import zarr

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    encoding = {"time": {"units": f"hours since {np.datetime64(config.start, 'D')}", "dtype": "int64"}}
    try:
        digest, first = _Digest(), True
        for block in _integrate(config, progress):
            block = _describe(block, config)
            digest.update(block)
            if first:
                block.to_zarr(partial, mode="w", encoding=encoding, consolidated=False)
            else:
                static = [name for name in block.variables if "time" not in block[name].dims]
                block.drop_vars(static).to_zarr(partial, append_dim="time", consolidated=False)
            first = False
        zarr.open_group(partial, mode="r+").attrs["digest"] = digest.hexdigest()
        try:
            os.rename(partial, path)
        except OSError:
            if not path.exists():  # otherwise another process finished the same run first: keep its copy
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
