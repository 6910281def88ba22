"""Baselines a model has to beat, fitted on the user's own record under the same protocol.

`Panel` is the dense record they read; `fit_baselines` fits climatology, persistence, anomaly persistence, AR and VAR
ridge and hands out forecast Datasets; `interpolate*` carry reports and forecasts to other points; `boosting` holds the
gradient-boosting baselines. Definitions, with the readings that reproduce the tables of *stations-v1*, are in the
docstrings of the modules.
"""

from earth.baselines.boosting import BoostingConfig as BoostingConfig
from earth.baselines.boosting import fit_cross_sensor as fit_cross_sensor
from earth.baselines.boosting import fit_pooled_boosting as fit_pooled_boosting
from earth.baselines.climatology import Anomalies as Anomalies
from earth.baselines.climatology import Climatology as Climatology
from earth.baselines.climatology import fit_anomalies as fit_anomalies
from earth.baselines.climatology import fit_climatology as fit_climatology
from earth.baselines.forecasts import ALL_MODELS as ALL_MODELS
from earth.baselines.forecasts import MODELS as MODELS
from earth.baselines.forecasts import Baselines as Baselines
from earth.baselines.forecasts import fit_baselines as fit_baselines
from earth.baselines.forecasts import interpolate_forecast as interpolate_forecast
from earth.baselines.forecasts import interpolate_panel as interpolate_panel
from earth.baselines.panel import BaselineError as BaselineError
from earth.baselines.panel import Panel as Panel
from earth.baselines.regression import Ridge as Ridge
from earth.baselines.regression import fit_ar as fit_ar
from earth.baselines.regression import fit_var as fit_var
from earth.baselines.spatial import interpolate as interpolate
