"""Units, registry, channel metadata and normalisation."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from earth import sensors
from earth.sensors import (
    SENSORS,
    VARIABLES,
    Channel,
    Normalisation,
    ObservationError,
    Sensor,
    UnitError,
    UnknownSensorError,
    UnknownVariableError,
    Variable,
)


@pytest.mark.parametrize(
    ("unit", "value", "si"),
    [
        ("degC", 25.0, 298.15),
        ("degF", 77.0, 298.15),
        ("degF", -40.0, 233.15),
        ("hPa", 1013.25, 101_325.0),
        ("inHg", 29.9212, 101_325.0),
        ("mmHg", 760.0, 101_325.0),
        ("kt", 10.0, 5.14444),
        ("km/h", 36.0, 10.0),
        ("mph", 10.0, 4.4704),
        ("mm", 2.5, 0.0025),
        ("in", 1.0, 0.0254),
        ("%", 55.0, 0.55),
        ("oktas", 4.0, 0.5),
        ("MJ m-2", 1.5, 1.5e6),
        ("Wh m-2", 1000.0, 3.6e6),
        ("h", 0.5, 1800.0),
        ("rad", math.pi, 180.0),
    ],
)
def test_units_convert_to_si(unit, value, si):
    found = sensors.unit(unit)
    assert value * found.scale + found.offset == pytest.approx(si, rel=2e-5)


def test_spellings_of_one_unit_agree():
    for spellings in (("degC", "Celsius", "°C", "C"), ("m s-1", "m/s", "m s**-1", "mps"), ("hPa", "mb", "millibar")):
        assert len({sensors.unit(name) for name in spellings}) == 1


def test_unknown_unit_names_the_nearest():
    with pytest.raises(UnitError, match=r"unit 'hPaa' is not known; the nearest known one is 'hPa'"):
        sensors.unit("hPaa")


def test_every_variable_is_consistent():
    for variable in VARIABLES.values():
        wanted = sensors.unit(variable.units)
        assert (wanted.scale, wanted.offset) == (1.0, 0.0), variable.name
        for name in variable.file_units:
            assert sensors.unit(name).dimension == wanted.dimension, variable.name
        assert variable.circular == (variable.units == "degree")


@pytest.mark.parametrize(
    ("alias", "sensor", "variable"),
    [
        ("t2m", "station", "2m_temperature"),
        ("Air Temperature", "station", "2m_temperature"),
        ("airTemperature", "radiosonde", "temperature"),
        ("temperature", "station", "2m_temperature"),
        ("temperature", "aircraft", "temperature"),
        ("td2m", "station", "2m_dewpoint_temperature"),
        ("ps", "station", "surface_pressure"),
        ("pmer", "station", "mean_sea_level_pressure"),
        ("ff", "station", "10m_wind_speed"),
        ("windDirection", "radiosonde", "wind_direction"),
        ("swdown", "station", "surface_solar_radiation_downwards"),
        ("2m_temperature", "station", "2m_temperature"),
        ("sst", "buoy", "sea_surface_temperature"),
        ("nonsense", "station", None),
    ],
)
def test_aliases_depend_on_the_sensor(alias, sensor, variable):
    assert sensors.lookup_alias(alias, sensor) == variable


def test_unknown_names_name_the_nearest():
    with pytest.raises(
        UnknownSensorError, match=r"'statoin' is not registered; the nearest registered one is 'station'"
    ):
        sensors.sensor("statoin")
    with pytest.raises(UnknownVariableError, match=r"nearest registered one is '2m_temperature'"):
        sensors.variable("2m_temprature")
    with pytest.raises(UnknownVariableError, match=r"'mhs' has no channel 9; it has \[1, 2, 3, 4, 5\]"):
        sensors.sensor("mhs").channel(9)


@given(st.text("abc_:5", min_size=1), st.integers(0, 99_999))
def test_channel_columns_round_trip(name, channel):
    assert sensors.split_channel(sensors.join_channel(name, channel)) == (name, channel)


def test_channels_have_the_documented_metadata():
    assert {name: len(SENSORS[name].channels) for name in ("atms", "amsua", "mhs", "hirs4")} == {
        "atms": 22,
        "amsua": 15,
        "mhs": 5,
        "hirs4": 20,
    }
    # AMSU-A 3..14 is ATMS 3, 5..15 by design of ATMS: same centre, offsets, bandwidth and peak (polarisation differs).
    for mine, other in zip([3, *range(4, 15)], [3, 5, *range(6, 16)], strict=True):
        a, b = SENSORS["amsua"].channel(mine), SENSORS["atms"].channel(other)
        assert (a.frequency, a.offsets, a.bandwidth, a.peak_pressure) == (
            b.frequency,
            b.offsets,
            b.bandwidth,
            b.peak_pressure,
        )
    # Temperature sounding channels see higher and higher: the peak pressure falls monotonically.
    peaks = [SENSORS["atms"].channel(n).peak_pressure for n in range(3, 16)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] == 300.0
    # The closer to the 183.31 GHz line, the higher.
    peaks = [SENSORS["atms"].channel(n).peak_pressure for n in range(18, 23)]
    assert peaks == sorted(peaks, reverse=True)
    # HIRS/4 longwave: 15 um band.
    first = SENSORS["hirs4"].channel(1)
    assert first.wavenumber is not None
    assert 1e4 / first.wavenumber == pytest.approx(14.96, abs=0.01)
    assert first.frequency_hz == pytest.approx(20_045.91e9, rel=1e-5)
    assert SENSORS["atms"].channel(1).frequency_hz == 23.8e9
    assert SENSORS["atms"].channel(1).bandwidth_hz == pytest.approx(0.27e9)


def test_registration_is_checked():
    with pytest.raises(ObservationError, match="already registered"):
        sensors.register_sensor(Sensor("station", ()))
    with pytest.raises(ObservationError, match="already registered"):
        sensors.register_variable(Variable("2m_temperature", "K"))
    with pytest.raises(ObservationError, match=r"either frequency .* or wavenumber"):
        Channel(1)
    with pytest.raises(ObservationError, match="lists a channel number twice"):
        Sensor("x", (), (Channel(1, frequency=1.0), Channel(1, frequency=2.0)))
    with pytest.raises(UnknownVariableError, match="nearest"):
        Sensor("x", ("2m_temperatur",))
    with pytest.raises(ObservationError, match="is empty"):
        Variable("x", "1", valid_range=(1.0, 1.0))


def test_a_registered_variable_is_found_by_its_aliases(monkeypatch):
    for name in ("VARIABLES", "_BY_NAME"):
        monkeypatch.setattr(sensors, name, dict(getattr(sensors, name)))
    monkeypatch.setattr(sensors, "_BY_ALIAS", {k: list(v) for k, v in sensors._BY_ALIAS.items()})
    sensors.register_variable(Variable("leaf_wetness", "1", aliases=("wetness",)))
    assert sensors.lookup_alias("Wetness") == "leaf_wetness"
    sensors.register_variable(Variable("leaf_wetness", "1", aliases=("lw",)), replace=True)
    assert (sensors.lookup_alias("wetness"), sensors.lookup_alias("LW")) == (None, "leaf_wetness")


# -------------------------------------------------------------------------------------------------------- normalisation
NAMES = ("2m_temperature", "surface_pressure", "total_precipitation", "my_own")


def test_fit_matches_numpy_and_ignores_missing():
    rng = np.random.default_rng(0)
    values = rng.normal([280, 1e5, 1e-3, 0], [10, 800, 1e-3, 1], (500, 4)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = np.nan
    values[0, 1] = np.inf
    fitted = Normalisation.fit(values, NAMES)
    clean = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    np.testing.assert_allclose(fitted.mean, np.nanmean(clean, axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.sd, np.nanstd(clean, axis=0), rtol=1e-9)
    assert fitted.count.tolist() == np.isfinite(values).sum(axis=0).tolist()
    z = fitted.normalise(values)
    assert z.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(z), np.isnan(values))


def test_constant_and_empty_series_stay_finite():
    values = np.full((10, 3), np.nan)
    values[:, 0] = 300.0
    values[0, 1] = 1e5
    fitted = Normalisation.fit(values, NAMES[:3])
    assert fitted.sd.tolist()[:2] == [VARIABLES[n].floor for n in NAMES[:2]]
    assert (fitted.mean[2], fitted.sd[2], fitted.count[2]) == (1.0, 0.5, 0)  # centre and quarter of 0..2 m
    assert np.isfinite(fitted.normalise(np.zeros(3))).all()
    assert Normalisation.fit(values, NAMES[:3], floors={"2m_temperature": 2.0}).sd[0] == 2.0


@given(arrays(np.float64, (7, 4), elements=st.floats(-1e6, 1e6) | st.just(np.nan)))
def test_denormalise_inverts_normalise(values):
    fitted = Normalisation.fit(values, NAMES)
    back = fitted.denormalise(fitted.normalise(values))
    np.testing.assert_allclose(back, values, rtol=1e-12, atol=1e-9)


@given(arrays(np.float64, (3, 4), elements=st.floats(-1e30, 1e30, allow_subnormal=False) | st.just(np.nan)))
def test_normalisation_survives_json_bit_for_bit(values):
    fitted = Normalisation.fit(values, NAMES)
    again = Normalisation.from_json(json.dumps(json.loads(fitted.to_json())))
    assert again.variables == fitted.variables
    for name in ("mean", "sd", "count"):
        np.testing.assert_array_equal(getattr(again, name), getattr(fitted, name))


def test_normalise_by_name_in_any_order():
    fitted = Normalisation.fit(np.array([[1.0, 2, 3, 4], [3, 6, 9, 12]]), NAMES)
    both = np.array([[9.0, 1.0]])
    chosen = fitted.normalise(both, ["total_precipitation", "2m_temperature"])
    np.testing.assert_allclose(chosen, [[(9 - 6) / 3, (1 - 2) / 1]])
    with pytest.raises(UnknownVariableError, match="nearest fitted one is 'surface_pressure'"):
        fitted.normalise(both, ["surface_presure", "2m_temperature"])


def test_normalisation_rejects_nonsense():
    with pytest.raises(ObservationError, match=r"values of shape \(3, 2\)"):
        Normalisation.fit(np.zeros((3, 2)), NAMES)
    with pytest.raises(ObservationError, match="sd positive"):
        Normalisation(("a",), np.zeros(1), np.zeros(1), np.ones(1, np.int64))
    with pytest.raises(ObservationError, match="each variable needs mean, sd and count"):
        Normalisation.from_dict({"a": {"mean": 1.0, "sd": 1.0}})
