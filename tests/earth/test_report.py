"""earth.report: what the figures show is what the tables say; the page needs nothing but itself."""

import base64
import html.parser
import io
import re
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from earth import report
from earth.export import to_dataset
from earth.protocol import Protocol


def scores(models=("earth-o1", "var"), variables=("t2m", "ps"), leads=(1, 6, 24, 48)):
    rows = []
    for m, model in enumerate(models):
        for variable in variables:
            for group in ("training", "held_out"):
                for lead in leads:
                    value = (1 + m) * np.sqrt(lead) * (2 if group == "held_out" else 1)
                    row = {"variable": variable, "lead_hours": lead, "stations": group, "model": model, "rmse": value}
                    rows.append(
                        row | {"units": "degC", "rmse_lo": 0.9 * value, "rmse_hi": 1.2 * value, "coverage": 0.88}
                    )
    return pd.DataFrame(rows)


def axes_of(figure) -> list[Any]:
    return figure.axes


def lines_of(axis) -> dict[str, Any]:
    return {line.get_label(): line for line in axis.get_lines()}


def test_skill_panels_hold_the_table():
    figure = report.skill_by_lead(scores(), title="Skill")
    panels = [a for a in axes_of(figure) if a.get_visible()]
    assert [a.get_title(loc="left") for a in panels] == ["t2m", "ps"]
    line = lines_of(panels[0])["VAR ridge"]
    np.testing.assert_array_equal(line.get_xdata(), [1, 6, 24, 48])
    np.testing.assert_allclose(line.get_ydata(), 2 * np.sqrt([1, 6, 24, 48]))
    assert panels[0].get_ylabel() == "RMSE (°C)"
    assert panels[0].get_xscale() == "log"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["earth-o1", "VAR ridge"]
    band = panels[0].collections[0].get_paths()[0].vertices
    assert len(panels[0].collections) == 1
    assert band[:, 1].max() == pytest.approx(1.2 * np.sqrt(48))
    held = report.skill_by_lead(scores(), stations="held_out", models=["var"], bands=())
    np.testing.assert_allclose(axes_of(held)[0].get_lines()[0].get_ydata(), 4 * np.sqrt([1, 6, 24, 48]))
    assert not axes_of(held)[0].collections
    covered = report.skill_by_lead(scores(), metric="coverage")
    assert axes_of(covered)[0].get_ylabel() == "coverage of 90 % interval"
    with pytest.raises(ValueError, match="'nowhere'"):
        report.skill_by_lead(scores(), stations="nowhere")


def test_figures_do_not_depend_on_nor_touch_the_callers_style():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"axes.grid": False, "font.size": 20}):
        figure = report.skill_by_lead(scores())
    assert axes_of(figure)[0].title.get_fontsize() == 10
    assert dict(matplotlib.rcParams) == before


def test_scorecard_numbers_and_significance():
    rows = [
        {"variable": "t2m", "lead_hours": 6, "stations": "training", "ratio": 0.93, "ratio_lo": 0.9, "ratio_hi": 0.97},
        {"variable": "t2m", "lead_hours": 24, "stations": "training", "ratio": 1.02, "ratio_lo": 0.9, "ratio_hi": 1.1},
        {
            "variable": "t2m",
            "lead_hours": np.nan,
            "stations": "training",
            "ratio": 0.97,
            "ratio_lo": 0.9,
            "ratio_hi": 1.0,
        },
    ]
    figure = report.scorecard(pd.DataFrame(rows), reference="VAR ridge")
    texts = {t.get_text(): t.get_fontweight() for t in axes_of(figure)[0].texts}
    assert texts == {"0.93": "bold", "1.02": "normal"}
    assert axes_of(figure)[1].get_ylabel() == "score / VAR ridge's"


def test_station_map_marks_groups_and_missing_values():
    lat, lon = np.array([22.0, 23.0, 25.0, 24.0]), np.array([120.0, 121.0, 121.5, 120.5])
    figure = report.station_map(
        lat, lon, np.array([1.0, 2.0, np.nan, 3.0]), label="RMSE (K)", names="abcd", held_out=["d"], annotate=1
    )
    axis = axes_of(figure)[0]
    assert [t.get_text() for t in axis.texts] == ["d: 3.00"]
    filled = [c for c in axis.collections if c.get_array() is not None]
    assert [len(c.get_offsets()) for c in filled] == [2, 1]
    assert filled[0].get_clim() == filled[1].get_clim() == (1.0, 3.0)
    assert axis.get_aspect() == pytest.approx(1 / np.cos(np.deg2rad(23.5)))
    centred = report.station_map(lat, lon, np.array([0.9, 1.3, 1.0, 1.0]), label="ratio", centre=1.0)
    assert axes_of(centred)[0].collections[0].get_clim() == pytest.approx((0.7, 1.3))


def small_world():
    times = pd.date_range("2021-01-20", "2021-02-05", freq="h").to_numpy()
    rng = np.random.default_rng(0)
    truth = 285 + 5 * np.sin(np.arange(len(times)) * 2 * np.pi / 24)
    observed = np.where(rng.random(len(times)) < 0.1, np.nan, truth)
    grid = xr.Dataset({"2m_temperature": (("time", "station"), observed[:, None])}, {"time": times, "station": ["a"]})
    inits = times[24:-48:6]
    row = 24 + 6 * np.arange(len(inits))
    mean = np.stack([truth[row + 6], truth[row + 24] + 1], 1)[..., None, None]
    forecast = to_dataset(
        mean,
        np.ones_like(mean),
        init_times=inits,
        lead_hours=[6, 24],
        variables=["2m_temperature"],
        stations=["a"],
        latitude=[24.0],
        longitude=[121.0],
    )
    return grid, forecast


def test_time_series_in_the_users_units():
    grid, forecast = small_world()

    class Column:
        variable, units, scale, offset = "2m_temperature", "degC", 1.0, 273.15

    figure = report.time_series(
        forecast, grid, station="a", variable="2m_temperature", leads=(6, 24), columns={"t2m": Column()}
    )
    assert len(axes_of(figure)) == 2
    assert figure.get_supylabel() == "t2m (°C)"
    line = lines_of(axes_of(figure)[1])["forecast"]
    valid = pd.DatetimeIndex(line.get_xdata())
    want = 285 + 5 * np.sin((valid - pd.Timestamp("2021-01-20")) / pd.Timedelta(hours=1) * 2 * np.pi / 24) + 1 - 273.15
    np.testing.assert_allclose(line.get_ydata(), want)
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {
        "forecast",
        "observed",
        "50 % interval",
        "90 % interval",
    }
    wide = max(c.get_paths()[0].vertices[:, 1].max() for c in axes_of(figure)[0].collections)
    assert wide == pytest.approx(290 - 273.15 + 1.645, abs=0.01)
    with pytest.raises(ValueError, match="lead 3 h"):
        report.time_series(forecast, grid, station="a", variable="2m_temperature", leads=(3,))


def test_time_series_does_not_bridge_gaps():
    grid, forecast = small_world()
    holed = forecast.isel(init_time=[0, 1, 2, 10, 11, 12])
    figure = report.time_series(holed, grid, station="a", variable="2m_temperature", leads=(6,))
    lengths = [len(line.get_xdata()) for line in axes_of(figure)[0].get_lines() if line.get_linestyle() == "-"]
    assert lengths == [3, 3]


def test_calibration_bars_and_coverage():
    rng = np.random.default_rng(0)
    figure = report.calibration(
        {"2m_temperature": rng.random((50, 4, 10)), "surface_pressure": np.full((2, 2), np.nan)}, bins=10
    )
    bars = axes_of(figure)[0].patches
    assert len(bars) == 10
    assert sum(b.get_height() * b.get_width() for b in bars) == pytest.approx(1)
    line = axes_of(figure)[2].get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata(), atol=0.06)
    with pytest.raises(ValueError, match="no spread"):
        report.calibration({})


def test_field_and_stations_share_their_colours():
    lon, lat = np.linspace(120, 122, 30), np.linspace(22, 25, 40)
    field = 290 - 0.005 * np.add.outer(lat * 100, lon)
    stations = np.array([120.5, 121.0]), np.array([23.0, np.nan]), np.array([280.0, np.nan])
    figure = report.field_map(
        lon, lat, field, label="2 m temperature (K)", stations=stations, height=500 * np.add.outer(lat - 22, lon - 120)
    )
    mesh, *_, points = [c for c in axes_of(figure)[0].collections if c.get_array() is not None and len(c.get_array())]
    assert mesh.get_clim() == points.get_clim()
    assert len(points.get_offsets()) == 1
    with pytest.raises(ValueError, match=r"field has shape \(40, 30\)"):
        report.field_map(lat, lon, field, label="x")


def test_loss_curve():
    history = {
        "step": np.arange(100),
        "loss": np.exp(-np.arange(100) / 30),
        "validation": [1.0 if i % 10 == 0 else np.nan for i in range(100)],
    }
    figure = report.loss_curve(history, smooth=5, marks={"roll-out": 60}, log=True)
    lines = lines_of(axes_of(figure)[0])
    assert {"loss", "validation"} <= set(lines)
    assert len(lines["validation"].get_xdata()) == 10
    assert lines["loss"].get_ydata()[-1] == pytest.approx(np.exp(-np.arange(95, 100) / 30).mean())
    assert axes_of(figure)[0].get_yscale() == "log"
    with pytest.raises(ValueError, match="no column 'step'"):
        report.loss_curve({"loss": [1.0]})


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.links: list[Any] = []
        self.images: list[Any] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[k] for k in ("href", "src") if k in values and tag != "img"]
        if tag == "img":
            self.images.append(values["src"])
        if tag == "script":
            self.links.append("script")
        if tag not in ("meta", "img", "br", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_page_is_self_contained_and_well_formed(tmp_path, monkeypatch):
    data = tmp_path / "secret folder" / "obs.parquet"
    data.parent.mkdir()
    data.write_bytes(b"12345")
    protocol = Protocol(name="weeks", test=[("2021-01-22", "2021-01-29")], held_out=("466990",), source="a <b> & c")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "run.py"), "--observations", str(data), "--seed", "3"])
    origin = report.provenance(data=[data], protocol=protocol, seeds=[3], extra={"parameters": 1_200_000})
    section = report.Section(
        "Skill <1>",
        "First.\n\nSecond & last.",
        [("RMSE by lead", report.skill_by_lead(scores()))],
        [("Scores", scores().head(3))],
    )
    path = report.write_report(tmp_path / "out" / "report.html", title="T < U", sections=[section], origin=origin)
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|url\(", text)
    assert "T &lt; U" in text
    [image] = page.images
    prefix = "data:image/png;base64,"
    assert image.startswith(prefix)
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(image[len(prefix) :])), format="png")
    assert pixels.shape[1] > 700
    assert pixels[..., :3].std() > 0.05  # not a blank sheet
    assert {"earth-o1", "degC", "2.449 [2.205, 2.939]", "a <b> & c"} <= set(page.cells) | {
        c.removeprefix("weeks: ") for c in page.cells
    }
    assert "secret folder" not in text
    assert str(tmp_path) not in text
    assert "python run.py --observations obs.parquet --seed 3" in page.cells
    assert origin["data: obs.parquet"].startswith("5 bytes, sha256 5994471abb01112a")
    assert "numpy" in origin["packages"]
    assert origin["test intervals"] == "2021-01-22 to 2021-01-29"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_units_as_shown():
    assert report.pretty_units("m s-1") == "m s⁻¹"
    assert report.pretty_units("W m-2") == "W m⁻²"
    assert report.pretty_units("degC") == "°C"
    assert report.pretty_units("1") == ""
    assert report.pretty_units("hPa") == "hPa"
