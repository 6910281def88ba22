"""Readers: files and arrays of users to the observation table and to `Reports`.

`read` takes a file of any known format and returns the canonical table; `stream` does so in pieces that fit in memory,
for `earth.archive.append`. By format: `read_stations` takes a wide table (one column per variable), `read_table` a
long one, `read_arrays` zarr and xarray, `read_bufr` and `stream_bufr` BUFR, `read_ioda` IODA netCDF, `stream_parquet`
NNJA-AI and HealDA, `stream_weatherbenchx` WeatherBench-X.
"""

from earth.readers.arrays import read_arrays as read_arrays
from earth.readers.bufr import MissingExtraError as MissingExtraError
from earth.readers.bufr import read_bufr as read_bufr
from earth.readers.bufr import stream_bufr as stream_bufr
from earth.readers.files import read as read
from earth.readers.files import stream as stream
from earth.readers.ioda import read_ioda as read_ioda
from earth.readers.parquet import stream_parquet as stream_parquet
from earth.readers.stations import StationTable as StationTable
from earth.readers.stations import read_stations as read_stations
from earth.readers.tables import ColumnMapping as ColumnMapping
from earth.readers.tables import read_table as read_table
from earth.readers.weatherbenchx import read_weatherbenchx as read_weatherbenchx
from earth.readers.weatherbenchx import stream_weatherbenchx as stream_weatherbenchx
