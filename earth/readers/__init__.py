"""Readers: files and arrays of users to the observation table and to `Reports`.

`read_stations` takes a wide table (one column per variable), `read_table` a long one, `read_arrays` zarr and xarray.
"""

from earth.readers.arrays import read_arrays as read_arrays
from earth.readers.stations import StationTable as StationTable
from earth.readers.stations import read_stations as read_stations
from earth.readers.tables import ColumnMapping as ColumnMapping
from earth.readers.tables import read_table as read_table
