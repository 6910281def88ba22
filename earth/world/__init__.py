"""The global world model: one grid-free field of the atmosphere, fed and read by every sensor.

    cfg = WorldConfig(sensors=(SensorConfig("station", ("2m_temperature",)), ...))
    fitted = fit(reports, cfg)                                   # normals and anchors, from training reports
    record = Record(reports, cfg.sensors, cfg.field, fitted.anchors, fitted.normals, cfg.step)
    params = train((record,), fitted, cfg, TrainConfig((StageConfig("short", 4000), ...)), directory)
    state = analyse(params, record, init, cycles=4, cfg=cfg)     # or assimilate, advance, observe one by one
    prediction, spread = forecast(params, record, frame, cycles=4, cfg=cfg)

`climate` has the normals, `records` the windows, `field` the anchors, `network` the learned maps, `model` the verbs,
`training` the objective, `forecasts` forecasts at any points, `inversion` heads on the frozen trunk, `denial` the
matrix of which sensor tells of which, `snapshot` scenes of a single file (fit, train, reconstruct of its own, with the
first guesses of `guess`). Only sensors that report are read; nothing is ever on a grid.
"""

from earth.world.climate import Climate as Climate
from earth.world.climate import fit_climate as fit_climate
from earth.world.denial import denial_matrix as denial_matrix
from earth.world.field import Anchors as Anchors
from earth.world.field import FieldConfig as FieldConfig
from earth.world.forecasts import analyse as analyse
from earth.world.forecasts import ensemble as ensemble
from earth.world.forecasts import forecast as forecast
from earth.world.forecasts import queries as queries
from earth.world.forecasts import sample as sample
from earth.world.inversion import Inversion as Inversion
from earth.world.inversion import InversionConfig as InversionConfig
from earth.world.inversion import fit_inversion as fit_inversion
from earth.world.inversion import invert as invert
from earth.world.model import Fitted as Fitted
from earth.world.model import Params as Params
from earth.world.model import Shared as Shared
from earth.world.model import State as State
from earth.world.model import WorldConfig as WorldConfig
from earth.world.model import advance as advance
from earth.world.model import assimilate as assimilate
from earth.world.model import fit as fit
from earth.world.model import load_model as load_model
from earth.world.model import observe as observe
from earth.world.model import save_model as save_model
from earth.world.network import NetworkConfig as NetworkConfig
from earth.world.records import Record as Record
from earth.world.records import SensorConfig as SensorConfig
from earth.world.records import Tokens as Tokens
from earth.world.training import StageConfig as StageConfig
from earth.world.training import TrainConfig as TrainConfig
from earth.world.training import train as train
