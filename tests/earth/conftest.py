"""A small synthetic network whose weather is known: a travelling wave on a daily and yearly cycle, with relief."""

import numpy as np
import pandas as pd
import pytest

from earth.observations import Reports
from earth.protocol import Protocol


def synthetic_network(days: int = 50, stations: int = 7, seed: int = 0) -> Reports:
    """Hourly 2m_temperature (K) and surface_pressure (Pa) at `stations` sites; 2 % missing."""
    rng = np.random.default_rng(seed)
    hours = np.arange(24 * days)
    latitude, longitude = rng.uniform(23, 25, stations), rng.uniform(120, 122, stations)
    height = rng.uniform(0, 800, stations)
    phase = 2 * np.pi * (hours[:, None] / 60.0 - (longitude - 120) / 4.0)
    noise = np.zeros((len(hours), stations))
    for t in range(1, len(hours)):
        noise[t] = 0.95 * noise[t - 1] + 0.3 * rng.normal(size=stations)
    warm = 293 - 6.5e-3 * height + 3 * np.cos(2 * np.pi * (hours[:, None] + 3) / 24) + 2 * np.sin(phase) + noise
    press = 101325 * (1 - 2.25577e-5 * height) ** 5.25588 + 300 * np.cos(phase) + 30 * noise
    values = np.stack([warm, press], -1)
    values[rng.random(values.shape) < 0.02] = np.nan
    start = pd.Timestamp("2021-03-01").value // 10**9
    order = lambda a: np.repeat(a, len(hours))  # noqa: E731
    return Reports(
        sensor="station",
        variables=("2m_temperature", "surface_pressure"),
        platforms=tuple(f"S{i}" for i in range(stations)),
        platform=np.repeat(np.arange(stations), len(hours)),
        time=np.tile(start + 3600 * hours, stations),
        latitude=order(latitude),
        longitude=order(longitude),
        height=order(height),
        values=values.transpose(1, 0, 2).reshape(-1, 2),
    )


@pytest.fixture(scope="session")
def network_record() -> Reports:
    return synthetic_network()


@pytest.fixture(scope="session")
def network_protocol() -> Protocol:
    return Protocol.from_periods(
        test=[("2021-04-12", "2021-04-19")], train=("2021-03-01", "2021-04-12"), leads=(3.0, 6.0), held_out=()
    )
