"""Earth-o1: an observation-native, grid-free world model of the atmosphere (arXiv 2605.06337).

    from earth import assimilate, advance, observe

Read `earth.model` for the verbs, `earth.train` for training, `earth.observations` for the table every reader produces,
and `examples/forecast_stations.py` for the whole path from a user's table to a report.
"""

from earth.model import EarthConfig as EarthConfig
from earth.model import Params as Params
from earth.model import Queries as Queries
from earth.model import State as State
from earth.model import advance as advance
from earth.model import assimilate as assimilate
from earth.model import observe as observe
