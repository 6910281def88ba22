"""What a simulated observing system sees: two days of a nature run, every instrument, six hours on a map.

    python examples/observing_system.py --out out/observing_system

The atmosphere starts from rest (extra `osse`), so this shows coverage and errors, not weather. OUT receives table.csv,
one row per sensor and variable with the number of values and the error they were given beside the stated one, and
coverage.png, which has the sounders' weighting functions too.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the presets are not installed

from configs import osse_global
from earth.osse import AFTERNOON, MORNING, Simulation, simulate
from earth.osse.nature import continentality, relief
from earth.osse.radiation import weighting_function
from earth.report import MARKERS, PALETTE, STYLE
from earth.sensors import join_channel

IN_SITU = ("station", "radiosonde", "aircraft", "ship")
RADIANCES = (  # sensor, channel, title
    ("simulated_amsua", 6, "morning sounder, 54.4 GHz (K)"),
    ("simulated_atms", 7, "afternoon sounder, 54.4 GHz (K)"),
    ("simulated_geo_imager", 1, "geostationary imager, 10.8 μm (K)"),
)


def summary(world: Simulation) -> pd.DataFrame:
    """One row per sensor and variable: values, platforms, mean and standard deviation of value minus truth, and the
    random error stated in the table (biases are not stated).
    """
    table: Any = world.table.assign(
        error=world.table["value"] - world.meta.truth_values,
        variable=[join_channel(v, c) for v, c in zip(world.table["variable"], world.table["channel"], strict=True)],
    )
    rows = table.groupby(["sensor", "variable"], sort=False).agg(
        values=("value", "size"),
        platforms=("platform", "nunique"),
        mean_error=("error", "mean"),
        sd_error=("error", "std"),
        stated_error=("obs_error", "mean"),
    )
    return rows.reset_index()


def coverage(table: Any, start: np.datetime64, hours: int, summit: float) -> Figure:
    """Maps of what is reported in `hours` from `start`: in situ, radiances, winds over the sea; weighting functions.

    Continents (half land) are outlined in grey, mountains (a quarter of `summit`, in m) in black.
    """
    when = table["time"].to_numpy()
    table = table[(when >= start) & (when < start + np.timedelta64(hours, "h"))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        first, *middle, last, weights = figure.subplots(3, 2).ravel()
        for sensor, colour, marker in zip(IN_SITU, PALETTE, MARKERS, strict=False):
            part = table[table["sensor"] == sensor].drop_duplicates(["platform", "time"])
            first.scatter(part["longitude"], part["latitude"], 8, colour, marker=marker, linewidths=0, label=sensor)
        first.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), markerscale=1.6, columnspacing=1)
        first.set_title("in situ")
        for axis, (sensor, channel, title) in zip(middle, RADIANCES, strict=True):
            part = table[(table["sensor"] == sensor) & (table["channel"] == channel)]
            shown = axis.scatter(part["longitude"], part["latitude"], 5, part["value"], linewidths=0, cmap="viridis")
            figure.colorbar(shown, ax=axis, shrink=0.85)
            axis.set_title(title)
        part = table[table["sensor"] == "scatterometer"]
        u, v = (part.loc[part["variable"].str.contains(f"_{name}_"), "value"].to_numpy() for name in "uv")
        part = part.drop_duplicates(["time", "latitude", "longitude"])
        shown = last.quiver(part["longitude"], part["latitude"], u, v, np.hypot(u, v), cmap="viridis", width=0.002)
        figure.colorbar(shown, ax=last, shrink=0.85)
        last.set_title("scatterometer, wind over the sea (m s⁻¹)")
        for axis in (first, *middle, last):
            _ground(axis, summit)
        _weights(weights)
        figure.suptitle(f"{str(start)[:16]} UTC and the {hours} h after it")
    return figure


def _weights(axis: Axes) -> None:
    pressure = np.geomspace(2e3, 1e5, 200)
    for sounder, style, name in ((MORNING, "-", "morning"), (AFTERNOON, "--", "afternoon")):
        curves = weighting_function(sounder.channels, pressure, np.zeros(()))
        for channel, curve, colour in zip(sounder.channels, curves, PALETTE, strict=False):
            label = name if channel is sounder.channels[0] else None
            axis.plot(curve, pressure / 100, style, color=colour, label=label)
            top = curve.argmax()
            axis.annotate(f"{channel.channel.frequency:.1f}", (curve[top] + 0.01, pressure[top] / 100), fontsize=7)
    axis.set(yscale="log", xlim=(0, 0.85), ylim=(1000, 20), ylabel="hPa", xlabel="weight per ln p at nadir")
    axis.set_yticks([1000, 500, 200, 100, 50, 20], labels=["1000", "500", "200", "100", "50", "20"])
    axis.minorticks_off()
    axis.legend(loc="upper right")
    axis.set_title("weighting functions of the sounders (GHz)")


def _ground(axis: Axes, summit: float) -> None:
    longitude, latitude = np.meshgrid(np.linspace(-180, 180, 181), np.linspace(-90, 90, 91))
    axis.contour(longitude, latitude, continentality(latitude, longitude), [0.5], colors="#9a9a9a", linewidths=0.8)
    if summit:
        heights = relief(latitude, longitude, summit)
        axis.contour(longitude, latitude, heights, [0.25 * summit], colors="black", linewidths=0.6)
    axis.set(xlim=(-180, 180), ylim=(-90, 90), xticks=range(-180, 181, 60), yticks=range(-90, 91, 30), aspect="equal")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="the smallest preset: seconds")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    preset = osse_global.tiny()
    if not given.tiny:
        nature = dataclasses.replace(preset.nature, days=2, save_hours=3)
        preset = dataclasses.replace(osse_global.t21(), nature=nature)
    world = simulate(dataclasses.replace(preset, seed=given.seed), cache=given.out / "nature")
    rows = summary(world)
    print(rows.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    rows.to_csv(given.out / "table.csv", index=False)
    start = world.meta.start + np.timedelta64(12, "h")
    coverage(world.table, start, 6, preset.nature.relief_height).savefig(given.out / "coverage.png")
    print(f"\n{len(world.table):,} values over {preset.nature.days} day(s); map in {given.out / 'coverage.png'}")
    for caveat in world.meta.caveats:
        print(f"- {caveat}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
