"""Figures of a verification, and one self-contained HTML page that holds them with tables and provenance.

Every plot takes tables or arrays and returns a `matplotlib.figure.Figure`, made without pyplot and so without global
state. Colours are Okabe & Ito's (distinct for colour-blind readers), fields use perceptually uniform maps, values and
units are those of the table given.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import html
import importlib.metadata
import io
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.colors
import matplotlib.dates
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from scipy import special

from earth import verify
from earth.export import SPREAD, lead_hours_of
from earth.protocol import Protocol, utc_times

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.6,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
}
_NAMES = {
    "2m_temperature": "2 m temperature",
    "2m_dewpoint_temperature": "2 m dew point",
    "surface_pressure": "surface pressure",
    "10m_u_component_of_wind": "10 m eastward wind",
    "10m_v_component_of_wind": "10 m northward wind",
}


_MODELS = {"ar": "AR ridge", "var": "VAR ridge", "boosting": "gradient boosting", "lapse_idw": "lapse rate + IDW"}


def model_name(model: str) -> str:
    """A model's label in legends: the baselines' names spelled out, underscores as blanks."""
    return _MODELS.get(model, model.replace("_", " "))


def pretty_units(units: str) -> str:
    """`m s-1` -> `m s⁻¹`, `degC` -> `°C`, `1` -> ``: units as a figure shows them."""
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    words = []
    for word in str(units).split():
        cut = next((i for i, c in enumerate(word) if c in "-0123456789" and i > 0), len(word))
        words.append(word[:cut] + word[cut:].translate(raised))
    text = " ".join(words)
    return {"degC": "°C", "degF": "°F", "1": "", "degree": "°"}.get(text, text)


def _label(name: str, units: str = "") -> str:
    shown = _NAMES.get(name, name.replace("_", " "))
    unit = pretty_units(units)
    return f"{shown} ({unit})" if unit else shown


_P = ParamSpec("_P")


def _styled(function: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Run a plot under the house's style, whatever the caller's rcParams are."""

    @functools.wraps(function)
    def plot(*arguments: _P.args, **options: _P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return function(*arguments, **options)

    return plot


def _panels(count: int, *, width: float = 3.3, height: float = 2.6, columns: int = 3) -> tuple[Figure, list[Axes]]:
    across = min(columns, max(count, 1))
    down = math.ceil(max(count, 1) / across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, list(axes[:count])


def _lead_axis(axis: Axes, leads: Sequence[Any]) -> None:
    """Leads on a logarithmic axis with exactly the leads as ticks (linear when they are few or close)."""
    ticks = sorted(set(leads))
    if len(ticks) > 2 and ticks[-1] / ticks[0] > 6:
        axis.set_xscale("log")
    axis.set_xticks(ticks if len(ticks) <= 9 else ticks[:: math.ceil(len(ticks) / 9)])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_xlabel("lead time (h)")


@_styled
def skill_by_lead(
    scores: pd.DataFrame,
    *,
    metric: str = "rmse",
    stations: str | None = None,
    models: Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """One panel per variable: the score by lead, one line per model, a band for its bootstrap interval.

    Args:
      scores: table of `verify.score` (several models concatenated).
      metric: rmse, mae, bias, crps, spread_skill, coverage, acc or variance_ratio.
      stations: group to show; None = the first in the table.
      models: order and choice of models; None = as in the table.
      bands: models whose interval is drawn; None = the first (bands of all models hide each other).
      title: above the panels.
    """
    group = scores["stations"].iloc[0] if stations is None else stations
    table = scores.loc[(scores["stations"] == group) & scores[metric].notna()]
    if table.empty:
        raise ValueError(f"no {metric} of the group {group!r} in the table; it has {sorted(set(scores['stations']))}")
    names = list(dict.fromkeys(table["model"])) if models is None else list(models)
    variables = list(dict.fromkeys(table["variable"]))
    figure, axes = _panels(len(variables))
    with_units = metric in ("rmse", "mae", "bias", "crps", "spread")
    for axis, variable in zip(axes, variables, strict=True):
        rows = table.loc[table["variable"] == variable]
        for i, model in enumerate(names):
            line = rows.loc[rows["model"] == model].sort_values("lead_hours")
            if line.empty:
                continue
            look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}
            axis.plot(line["lead_hours"], line[metric], label=model_name(model), zorder=3 - 0.01 * i, **look)
            shaded = model in (names[:1] if bands is None else bands)
            if shaded and f"{metric}_lo" in line and line[f"{metric}_lo"].notna().any():
                axis.fill_between(
                    line["lead_hours"],
                    line[f"{metric}_lo"],
                    line[f"{metric}_hi"],
                    color=look["color"],
                    alpha=0.15,
                    lw=0,
                )
        _lead_axis(axis, list(rows["lead_hours"]))
        units = pretty_units(str(rows["units"].iloc[0])) if with_units and "units" in rows.columns else ""
        axis.set_title(_label(variable))
        axis.set_ylabel(_METRIC_NAMES.get(metric, metric) + (f" ({units})" if units else ""))
        if metric in ("rmse", "mae", "crps", "spread"):
            axis.set_ylim(bottom=0)
        reference = {"spread_skill": 1.0, "variance_ratio": 1.0, "coverage": 0.9, "bias": 0.0}.get(metric)
        if reference is not None:
            axis.axhline(reference, color="#444444", lw=0.8, ls="--", zorder=1)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


_METRIC_NAMES = {
    "rmse": "RMSE",
    "mae": "MAE",
    "crps": "CRPS",
    "bias": "bias",
    "acc": "anomaly correlation",
    "spread_skill": "spread / RMSE",
    "variance_ratio": "variance ratio",
    "coverage": "coverage of 90 % interval",
    "spread": "spread",
}


@_styled
def scorecard(
    ratios: pd.DataFrame, *, stations: str | None = None, title: str | None = None, reference: str = "reference"
) -> Figure:
    """Ratio of two models' scores by variable and lead, from `verify.compare`; bold where the interval excludes 1."""
    group = ratios["stations"].iloc[0] if stations is None else stations
    table = ratios.loc[(ratios["stations"] == group) & ratios["lead_hours"].notna()]
    variables, leads = list(dict.fromkeys(table["variable"])), sorted(set(table["lead_hours"]))
    grid = table.pivot_table(index="variable", columns="lead_hours", values="ratio")
    grid = grid.reindex(index=variables, columns=leads)
    figure = Figure(figsize=(1.9 + 0.85 * len(leads), 1.25 + 0.42 * len(variables)), layout="constrained")
    axis = figure.subplots()
    reach = max(0.05, float(np.nanmax(np.abs(grid.to_numpy() - 1))))
    image = axis.imshow(grid.to_numpy(), cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    for row in table.to_dict("records"):
        y, x = variables.index(row["variable"]), leads.index(row["lead_hours"])
        if not math.isfinite(row["ratio"]):
            continue
        clear = row["ratio_hi"] < 1 or row["ratio_lo"] > 1
        dark = abs(row["ratio"] - 1) > 0.6 * reach
        text = axis.text(x, y, f"{row['ratio']:.2f}", ha="center", va="center", fontsize=9)
        text.set(fontweight="bold" if clear else "normal", color="white" if dark else "#222222")
    axis.set_xticks(range(len(leads)), [f"{h:g}" for h in leads])
    axis.set_yticks(range(len(variables)), [_label(v) for v in variables])
    axis.set_xlabel("lead time (h)")
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.colorbar(image, ax=axis, label=f"score / {reference}'s", shrink=0.9, ticks=MaxNLocator(5))
    figure.supxlabel("bold: the interval excludes 1", fontsize=7.5, color="#555555")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _geographic(axis: Axes, latitude: np.ndarray) -> None:
    """Degrees on both axes, with one kilometre as long east as north at the middle of the map."""
    middle = float(np.nanmean(latitude))
    axis.set_aspect(1 / max(math.cos(math.radians(middle)), 0.05))
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{abs(x):g}°{'E' if x > 0 else 'W' if x < 0 else ''}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{abs(y):g}°{'N' if y > 0 else 'S' if y < 0 else ''}"))


def _map_size(longitude: np.ndarray, latitude: np.ndarray, *, height: float = 4.6) -> tuple[float, float]:
    wide = (np.nanmax(longitude) - np.nanmin(longitude) + 0.5) * math.cos(math.radians(float(np.nanmean(latitude))))
    tall = np.nanmax(latitude) - np.nanmin(latitude) + 0.5
    return float(np.clip(height * wide / tall + 1.6, 3.6, 9)), height


@_styled
def station_map(
    latitude: np.ndarray,
    longitude: np.ndarray,
    values: np.ndarray,
    *,
    label: str,
    names: Sequence[str] | None = None,
    held_out: Iterable[str] = (),
    centre: float | int | None = None,
    annotate: int = 3,
    title: str | None = None,
) -> Figure:
    """Scores at stations on a map: circles, held-out stations as triangles, the `annotate` largest values named.

    Args:
      latitude, longitude: degrees [S].
      values: [S]; NaN is drawn as an open mark.
      label: of the colour bar, with units.
      names: of the stations.
      held_out: names drawn as triangles.
      centre: of a diverging colour scale, e.g. 1.0 for ratios or 0.0 for biases; None = sequential.
    """
    lat, lon, value = (np.asarray(a, np.float64) for a in (latitude, longitude, values))
    labels = [str(n) for n in (names if names is not None else range(len(lat)))]
    apart = np.isin(labels, [str(h) for h in held_out])
    figure = Figure(figsize=_map_size(lon, lat), layout="constrained")
    axis = figure.subplots()
    finite = value[np.isfinite(value)]
    # A station or two far off must not leave the others one colour: the scale ends early, with an arrow.
    distance = np.abs(finite - centre) if centre is not None else finite
    reach = float(distance.max()) if len(finite) else 1.0
    typical = float(np.quantile(distance, 0.85)) if len(finite) else 1.0
    cut = len(finite) > 8 and reach > 1.6 * typical > 0
    reach = max(1.25 * typical if cut else reach, 1e-12)
    if centre is None:
        scale = {"cmap": "viridis", "vmin": float(finite.min()) if len(finite) else 0.0, "vmax": reach}
        extend = "max" if cut else "neither"
    else:
        scale = {"cmap": "RdBu_r", "vmin": centre - reach, "vmax": centre + reach}
        extend = "both" if cut else "neither"
    mark = None
    for mask, marker, size in ((~apart, "o", 62), (apart, "^", 84)):
        there = mask & np.isfinite(value)
        if there.any():
            mark = axis.scatter(
                lon[there],
                lat[there],
                c=value[there],
                s=size,
                marker=marker,
                edgecolors="#333333",
                linewidths=0.6,
                zorder=3,
                **scale,
            )
        gone = mask & ~np.isfinite(value)
        axis.scatter(lon[gone], lat[gone], s=size, marker=marker, facecolors="none", edgecolors="#999999", zorder=2)
    order = np.argsort(np.where(np.isfinite(value), np.abs(value - (centre or 0)), -np.inf))[::-1]
    named = [i for i in order[:annotate] if np.isfinite(value[i])]
    for i in named:
        # Of two named neighbours the western one is written to the left.
        crowded = any(
            j != i and abs(lat[j] - lat[i]) < 0.05 * np.ptp(lat) and 0 <= lon[j] - lon[i] < 0.4 * np.ptp(lon)
            for j in named
        )
        axis.annotate(
            f"{labels[i]}: {value[i]:.2f}",
            (lon[i], lat[i]),
            xytext=(-6 if crowded else 6, 5),
            ha="right" if crowded else "left",
            textcoords="offset points",
            fontsize=7.5,
            zorder=4,
        )
    _geographic(axis, lat)
    axis.margins(0.12)
    if mark is not None:
        figure.colorbar(mark, ax=axis, label=label, shrink=0.85, extend=extend)
    if apart.any():
        # Marks without colour: a coloured one would look like a value.
        for marker, what in (("o", "training"), ("^", "held out")):
            axis.scatter([], [], s=60, marker=marker, facecolors="white", edgecolors="#333333", label=what)
        axis.legend(loc="upper left", handletextpad=0.2)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


@_styled
def time_series(
    forecast: xr.Dataset,
    observations: xr.Dataset,
    *,
    station: str,
    variable: str,
    leads: Sequence[float | int],
    start: Any = None,
    end: Any = None,
    columns: Mapping[str, Any] | None = None,
    levels: Sequence[int | float] = (0.5, 0.9),
    title: str | None = None,
) -> Figure:
    """Observations and forecasts of one station, a panel per lead: mean and central Gaussian intervals at valid
    time.

    Args:
      forecast, observations: as in `verify.score`.
      station, variable: what to show (ERA5 name).
      leads: hours, one panel each.
      start, end: valid times; None = the first ten days of the forecast.
      columns: the user's columns, for label and units (with offset, so that degC reads as degC).
      levels: probabilities of the shaded intervals.
    """
    label, units, scale, offset = _display(columns, variable, forecast)
    hours = lead_hours_of(forecast)
    figure = Figure(figsize=(7.6, 0.6 + 1.9 * len(leads)), layout="constrained")
    axes = figure.subplots(len(leads), 1, sharex=True, squeeze=False)[:, 0]
    first = utc_times(forecast["init_time"].to_numpy()).min() if start is None else utc_times([start])[0]
    last = first + np.timedelta64(10, "D") if end is None else utc_times([end])[0]
    seen = observations[variable].sel(station=station)
    times = utc_times(observations["time"].to_numpy())
    shown = (times >= first) & (times < last)
    for axis, lead in zip(axes, leads, strict=True):
        at = np.flatnonzero(np.isclose(hours, lead))
        if not len(at):
            raise ValueError(f"lead {lead:g} h is not in the forecast; it has {', '.join(f'{h:g}' for h in hours)}")
        part = forecast.isel(lead_time=int(at[0])).sel(station=station)
        valid = utc_times(part["valid_time"].to_numpy())
        inside = (valid >= first) & (valid < last)
        order = np.flatnonzero(inside)[np.argsort(valid[inside])]
        valid, mean = valid[order], (part[variable].to_numpy()[order] - offset) / scale
        # A line must not bridge hours without a forecast.
        step = np.median(np.diff(valid)) if len(valid) > 1 else np.timedelta64(1, "h")
        breaks = np.flatnonzero(np.diff(valid) > step) + 1
        if variable + SPREAD in part:
            sd = part[variable + SPREAD].to_numpy()[order] / abs(scale)
            for n, level in enumerate(sorted(levels, reverse=True)):
                bound = special.ndtri(0.5 + level / 2) * sd
                look = {
                    "color": _tint(PALETTE[0], 0.2 + 0.3 * n / max(len(levels) - 1, 1)),
                    "lw": 0,
                    "zorder": 1.5 + 0.01 * n,
                }
                for m, piece in enumerate(np.split(np.arange(len(valid)), breaks)):
                    text = f"{100 * level:g} % interval" if m == 0 else None
                    axis.fill_between(valid[piece], (mean - bound)[piece], (mean + bound)[piece], label=text, **look)
        for n, piece in enumerate(np.split(np.arange(len(valid)), breaks)):
            axis.plot(valid[piece], mean[piece], color=PALETTE[0], label="forecast" if n == 0 else None)
        values = (seen.to_numpy()[shown] - offset) / scale
        axis.plot(times[shown], values, ".", color="#222222", markersize=3, label="observed")
        axis.set_title(f"lead {lead:g} h")
        axis.margins(x=0.01)
    locator = matplotlib.dates.AutoDateLocator(maxticks=10)
    axes[-1].xaxis.set_major_locator(locator)
    axes[-1].xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(locator))
    axes[-1].set_xlabel("valid time (UTC)")
    figure.supylabel(_label(label, units), fontsize=axes[0].yaxis.label.get_size())
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title or f"Station {station}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _tint(colour: str, strength: float) -> tuple[float, ...]:
    """The colour mixed with white; opaque, so that a legend shows it as the figure does."""
    return tuple(1 - strength * (1 - c) for c in matplotlib.colors.to_rgb(colour))


def _display(columns: Mapping[str, Any] | None, variable: str, dataset: xr.Dataset) -> tuple[str, str, float, float]:
    for column, mapping in (columns or {}).items():
        if mapping.variable == variable:
            return str(column), str(mapping.units), float(mapping.scale), float(mapping.offset)
    return variable, str(dataset[variable].attrs.get("units", "")), 1.0, 0.0


@_styled
def calibration(
    pit: Mapping[str, np.ndarray], *, bins: int = 20, names: Mapping[str, str] | None = None, title: str | None = None
) -> Figure:
    """PIT histograms, a panel per variable, and in the last panel the observed against the nominal coverage of
    central intervals.

    Args:
      pit: values per variable (`verify.pit_values`), NaN = not scored.
      bins: of the histograms.
      names: labels of the variables.
    """
    if not pit:
        raise ValueError("no PIT values: the forecast has no spread")
    figure, axes = _panels(len(pit) + 1, height=2.4)
    levels = np.linspace(0.02, 0.98, 49)
    for i, (variable, values) in enumerate(pit.items()):
        frequency, edges = verify.histogram(values, bins)
        axis = axes[i]
        look = {"color": PALETTE[0], "alpha": 0.75, "edgecolor": "white", "lw": 0.5}
        axis.bar(edges[:-1], frequency * bins, np.diff(edges), align="edge", **look)
        axis.axhline(1, color="#444444", lw=0.9, ls="--")
        axis.set_title(_label((names or {}).get(variable, variable)))
        axis.set_xlabel("PIT")
        axis.set_ylabel("relative frequency")
        axis.set_xlim(0, 1)
        axis.grid(False)
        finite = values[np.isfinite(values)]
        covered = [(np.abs(finite - 0.5) <= level / 2).mean() if len(finite) else np.nan for level in levels]
        axes[-1].plot(
            levels,
            covered,
            color=PALETTE[i % len(PALETTE)],
            lw=1.4,
            label=(names or {}).get(variable, _label(variable)),
        )
    axes[-1].plot([0, 1], [0, 1], color="#444444", lw=0.8, ls="--")
    axes[-1].set(xlabel="nominal coverage", ylabel="observed coverage", xlim=(0, 1), ylim=(0, 1))
    axes[-1].set_title("central intervals")
    axes[-1].legend(loc="lower right", fontsize=7, handlelength=1.2, labelspacing=0.25, borderaxespad=0.2)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


@_styled
def field_map(
    longitude: np.ndarray,
    latitude: np.ndarray,
    field: np.ndarray,
    *,
    label: str,
    stations: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    height: np.ndarray | None = None,
    centre: float | int | None = None,
    title: str | None = None,
) -> Figure:
    """A gap-free field on a fine grid, station reports on the same colours over it, contours of relief where given.

    Args:
      longitude [X], latitude [Y]: degrees, increasing.
      field: [Y, X] in the units of `label`.
      label: of the colour bar, with units.
      stations: (longitude, latitude, value), [S] each.
      height: relief [Y, X] in metres.
      centre: of a diverging colour scale (winds, differences); None = sequential.
    """
    lon, lat, z = (np.asarray(a, np.float64) for a in (longitude, latitude, field))
    if z.shape != (len(lat), len(lon)):
        raise ValueError(f"field has shape {z.shape}, but latitude and longitude give {(len(lat), len(lon))}")
    every = z if stations is None else np.concatenate([z.ravel(), np.asarray(stations[2], np.float64)])
    low, high = np.nanpercentile(every, [0.5, 99.5])
    if centre is None:
        scale = {"cmap": "viridis", "vmin": low, "vmax": high}
    else:
        reach = max(abs(low - centre), abs(high - centre), 1e-12)
        scale = {"cmap": "RdBu_r", "vmin": centre - reach, "vmax": centre + reach}
    figure = Figure(figsize=_map_size(lon, lat, height=5.0), layout="constrained")
    axis = figure.subplots()
    axis.grid(False)
    mesh = axis.pcolormesh(lon, lat, z, shading="nearest", rasterized=True, **scale)
    if height is not None:
        steps = [s for s in (200, 500, 1000, 2000, 3000, 4000) if np.nanmin(height) < s < np.nanmax(height)]
        if steps:
            lines = axis.contour(lon, lat, height, levels=steps, colors="white", linewidths=0.6, alpha=0.8)
            axis.clabel(lines, fmt="%g m", fontsize=6.5)
    if stations is not None:
        where = np.isfinite(np.asarray(stations[2], np.float64))
        places = [np.asarray(a, np.float64)[where] for a in stations]
        look = {"s": 44, "edgecolors": "black", "linewidths": 0.9, "zorder": 3, "label": "reports"}
        axis.scatter(places[0], places[1], c=places[2], **look, **scale)
        axis.legend(loc="upper left", handletextpad=0.2, frameon=True, framealpha=0.85)
    _geographic(axis, lat)
    axis.set_xlim(lon[0], lon[-1])
    axis.set_ylim(lat[0], lat[-1])
    figure.colorbar(mesh, ax=axis, label=label, shrink=0.85, extend="both")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


@_styled
def loss_curve(
    history: pd.DataFrame | Mapping[str, Any],
    *,
    step: str = "step",
    log: bool = False,
    smooth: int = 1,
    marks: Mapping[str, float | int] | None = None,
    title: str | None = None,
) -> Figure:
    """Training curves: every column of `history` besides `step`, NaN where it was not measured.

    Args:
      history: one row per record.
      step: column of the horizontal axis.
      log: logarithmic vertical axis.
      smooth: running mean over this many records, drawn over the raw line.
      marks: label -> step of vertical lines, e.g. the starts of training stages.
    """
    table = pd.DataFrame(history)
    if step not in table:
        raise ValueError(f"history has no column {step!r}; it has {', '.join(map(str, table.columns))}")
    figure = Figure(figsize=(6.2, 3.3), layout="constrained")
    axis = figure.subplots()
    for i, column in enumerate(c for c in table.columns if c != step):
        part = table[[step, column]].dropna()
        colour = PALETTE[i % len(PALETTE)]
        dense = smooth > 1 and len(part) > 2 * smooth
        look: dict[str, Any] = {"lw": 0.8, "alpha": 0.3} if dense else {"label": str(column)}
        axis.plot(part[step], part[column], color=colour, **look)
        if dense:
            running = pd.Series(part[column]).rolling(smooth, min_periods=1).mean()
            axis.plot(part[step], running, color=colour, label=str(column))
    if log:
        axis.set_yscale("log")
    for label, at in (marks or {}).items():
        axis.axvline(at, color="#777777", lw=0.8, ls=":")
        axis.annotate(
            label, (at, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points", fontsize=7.5
        )
    axis.set_xlabel(step.replace("_", " "))
    axis.set_ylabel("loss")
    axis.legend()
    axis.set_title(title or "Training")
    return figure


# ---- the page
@_styled
def skill_by_group(scores: pd.DataFrame, *, strong: str = "world") -> Figure:
    """RMSE against the truth by lead, a panel per group and variable, for tables of `earth.osse.verification.score`.

    Args:
      scores: columns group, variable, lead_time (h), model and rmse, SI; pressure is drawn in hPa. Models whose names
        differ by a number at the end (`world_0`, `world_1`: seeds) share a colour and a legend entry.
      strong: drawn with a thicker line.
    """
    family = {name: re.sub(r"_\d+$", "", name) for name in dict.fromkeys(scores["model"])}
    families = list(dict.fromkeys(family.values()))
    panels: Any = list(scores.groupby(["group", "variable"], sort=False))
    across = max(1, min(4, math.ceil(len(panels) / 2)))
    figure, axes = _panels(len(panels), width=2.75, height=2.8, columns=across)
    for axis, ((group, variable), part) in zip(axes, panels, strict=True):
        unit, factor = ("hPa", 0.01) if "pressure" in variable else ("K", 1.0) if "temp" in variable else ("m s⁻¹", 1.0)
        for name, line in part.groupby("model", sort=False):
            i = families.index(family[str(name)])
            first = next(model for model in family if family[model] == families[i])
            axis.plot(
                line["lead_time"], line["rmse"] * factor, color=PALETTE[i % 8], marker=MARKERS[i % 8], ms=4,
                lw=2.2 if families[i] == strong else 1.2, label=model_name(families[i]) if name == first else None,
            )  # fmt: skip
        short = variable.removeprefix("lowest_level_").replace("_component_of_wind", "")
        axis.set(ylim=(0, None), title=f"{group}: {short.replace('surface_', '')} ({unit})")
        axis.set_xticks(sorted(set(part["lead_time"])))
        axis.tick_params(axis="x", labelrotation=60)
    for axis in axes[-across:]:
        axis.set_xlabel("lead time (h)")
    for axis in axes[::across]:
        axis.set_ylabel("RMSE against the truth")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8)
    return figure


@_styled
def globe_maps(
    rows: Sequence[Mapping[str, Any]], *, longitude: np.ndarray, latitude: np.ndarray, title: str | None = None
) -> Figure:
    """Maps of the whole globe side by side, a row per quantity, on one scale per row.

    Args:
      rows: each with `label` (with units), `panels` ({title: [Y, X] values}) and, where there are, `dots` ({title:
        (longitude, latitude)} of what was read for that panel).
      longitude, latitude: [X] and [Y] degrees.
    """
    columns = max(len(row["panels"]) for row in rows)
    figure = Figure(figsize=(3.5 * columns, 2.25 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    for line, row in zip(axes, rows, strict=True):
        values = np.stack(list(row["panels"].values()))
        size = float(np.nanpercentile(np.abs(values), 99.5))
        low, high = (
            (-size, size) if np.nanmin(values) < 0 < np.nanmax(values) else np.nanpercentile(values, [0.5, 99.5])
        )
        colours = "RdBu_r" if low == -high else "viridis"
        for axis, (name, field) in zip(line, row["panels"].items(), strict=False):
            mesh = axis.pcolormesh(
                longitude, latitude, field, shading="nearest", rasterized=True, cmap=colours, vmin=low, vmax=high
            )
            for x, y in [row.get("dots", {}).get(name, ((), ()))]:
                axis.plot(x, y, ".", color="black", ms=1.8, alpha=0.6)
            axis.set(xlim=(-180, 180), ylim=(-90, 90), aspect="equal", yticks=(-60, 0, 60))
            axis.set(xticks=(-180, -90, 0, 90, 180), title=name)
            axis.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: f"{abs(x):g}°{'E' if 0 < x < 180 else 'W' if -180 < x < 0 else ''}")
            )
            axis.yaxis.set_major_formatter(
                FuncFormatter(lambda y, _: f"{abs(y):g}°{'N' if y > 0 else 'S' if y < 0 else ''}")
            )
            axis.grid(visible=False)
        figure.colorbar(mesh, ax=list(line), shrink=0.9, pad=0.01, extend="both").set_label(row["label"])
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def provenance(
    *,
    data: Iterable[str | os.PathLike[str]] = (),
    protocol: Protocol | None = None,
    seeds: Iterable[int] = (),
    command: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Where a report comes from: data files with size and digest, protocol, seeds, versions, command, machine, time.

    Only the names of data files are kept, never the folders of this machine; the command is `sys.argv` unless given,
    with folders cut likewise.
    """
    out: dict[str, str] = {}
    for path in data:
        out[f"data: {Path(path).name}"] = _digest(Path(path))
    if protocol is not None:
        out["protocol"] = f"{protocol.name}: {protocol.source}" if protocol.source else protocol.name
        out["held-out stations"] = ", ".join(protocol.held_out) or "none"
        out["test intervals"] = "; ".join(f"{_day(a)} to {_day(b)}" for a, b in protocol.test)
    out["seeds"] = ", ".join(str(s) for s in seeds) or "none"
    words = [Path(w).name if os.path.isabs(w) else w for w in sys.argv]
    out["command"] = command or "python " + shlex.join(words)
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "pandas", "pyarrow", "xarray", "scikit-learn")
    out["python"] = platform.python_version()
    out["packages"] = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages if _installed(p))
    out["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    out["made"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return out | {k: str(v) for k, v in (extra or {}).items()}


def _digest(path: Path) -> str:
    if not path.is_file():
        return "a folder"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return f"{path.stat().st_size:,} bytes, sha256 {digest.hexdigest()[:16]}"


def _day(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, unit="auto")).removesuffix("T00")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: heading, a paragraph of plain text, figures with captions, tables with captions."""

    heading: str
    text: str = ""
    figures: Sequence[tuple[str, Figure]] = ()
    tables: Sequence[tuple[str, pd.DataFrame]] = ()


class Clock:
    """Wall time by phase, printed as it goes and kept for the report."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        print(f"\n== {phase}", flush=True)
        begun = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begun
        print(f"== {phase}: {self.seconds[phase]:.0f} s", flush=True)


_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1080px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; }
figcaption, caption { color: #555; font-size: .87rem; text-align: left; }
caption { caption-side: top; padding-bottom: .3rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1.5px solid #888; }
.provenance td { text-align: left; white-space: normal; }
.provenance th { text-align: left; vertical-align: top; }
.lead { color: #444; }
"""


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    sections: Sequence[Section],
    summary: str = "",
    origin: Mapping[str, str] | None = None,
    digits: int = 3,
) -> Path:
    """Write one HTML file that needs nothing else: figures as embedded PNG, tables, provenance; no script, no link.

    Args:
      path: the file; it appears under this name when complete.
      title, summary: head of the page, plain text.
      sections: its parts.
      origin: `provenance(...)`.
      digits: decimals of floating-point columns.

    Returns:
      The path.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if summary:
        parts.append(f'<p class="lead">{html.escape(summary)}</p>')
    number = 0
    for section in sections:
        parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [f"<p>{html.escape(p)}</p>" for p in section.text.split("\n\n") if p.strip()]
        for caption, figure in section.figures:
            number += 1
            code = base64.b64encode(png(figure)).decode("ascii")
            shown = html.escape(caption)
            parts.append(
                f'<figure><img alt="{shown}" src="data:image/png;base64,{code}">'
                f"<figcaption>Figure {number}. {shown}</figcaption></figure>"
            )
        for caption, table in section.tables:
            body = _table(table, digits)
            body = body.replace("<thead>", f"<caption>{html.escape(caption)}</caption><thead>", 1)
            parts.append(f'<div class="scroll">{body}</div>')
    if origin:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in origin.items())
        parts.append(f'<h2>Provenance</h2><table class="provenance">{rows}</table>')
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".partial-{os.getpid()}-{final.name}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, final)
    return final


def _table(table: pd.DataFrame, digits: int) -> str:
    """The table as HTML: empty columns left out, `x_lo` and `x_hi` folded into the column x as `x [lo, hi]`."""
    shown = table.dropna(axis=1, how="all").copy()
    for name in [c for c in shown.columns if f"{c}_lo" in shown.columns and f"{c}_hi" in shown.columns]:
        triples = zip(shown[name], shown.pop(f"{name}_lo"), shown.pop(f"{name}_hi"), strict=True)
        folded = [
            f"{x:.{digits}f} [{lo:.{digits}f}, {hi:.{digits}f}]" if math.isfinite(x) else "–" for x, lo, hi in triples
        ]
        shown[name] = pd.Series(folded, index=shown.index, dtype=object)
    shown.columns = [str(c).replace("_", " ") for c in shown.columns]
    return shown.to_html(
        index=False, border=0, na_rep="–", float_format=lambda x: f"{x:.{digits}f}", justify="right", classes=[]
    )
