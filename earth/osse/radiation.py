"""Brightness temperatures of a radiometer's channels, in closed form (ours).

Each channel has one well-mixed absorber whose optical depth from space down to a pressure p, along a path of zenith
angle theta, is

    delta(p) = (p / p1)^k sec(theta),

so the transmission to space is exp(-delta), the weighting function over ln(p) is k delta exp(-delta), and its peak,
at delta = 1, rises with the angle: p_peak = p1 cos(theta)^(1/k). Its full width at half maximum in ln(p) is 2.446 / k
at any angle. k = 2 is the wing of a pressure-broadened line of a well-mixed gas (oxygen near 50-60 GHz, CO2 at 15 um).
The brightness temperature is the mean temperature under that weight, which adds to 1 with the surface's.

What this is not: no water vapour, clouds or scattering (the truth is dry), no temperature dependence of absorption, and
radiance is taken as linear in temperature (Rayleigh-Jeans), which the infrared is not. Above the highest layer centre
of the nature run, where there is no truth, the air is as warm as there.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.special import exp1

from earth.osse.nature import OsseError
from earth.sensors import Channel

# x e^-x is half its maximum at x = 0.23196 and 2.67835.
_HALF_WIDTHS = float(np.log(2.6783469900166605 / 0.23196095298653444))


class ChannelError(OsseError):
    """A channel that cannot be simulated."""


@dataclasses.dataclass(frozen=True)
class SounderChannel:
    """A channel and how it sees the simulated atmosphere.

    Attributes:
      channel: number, frequency, polarisation, bandwidth and peak, as in the sensor's registry.
      noise: standard deviation of the random error of one footprint (NEDT), K.
      unit_depth: p1, pressure in Pa at which the vertical optical depth is 1; None takes the channel's peak. A window's
        lies far below the ground.
      width: full width at half maximum of the weighting function in ln(p); 1.22 is k = 2.
      bias: standard deviation over instruments of the constant error, K.
      scan_bias: standard deviation over instruments of the coefficients a and b of an error a x + b x^2, K, for x from
        -1 to 1 across the scan.
      emissivity: of the surface, which reflects the rest of what comes down. That is taken as the emission of air at
        the ground's temperature, and cold space as 0 K.
    """

    channel: Channel
    noise: float = 0.25
    unit_depth: float | None = None
    width: float = 1.22
    bias: float = 0.3
    scan_bias: float = 0.15
    emissivity: float = 1.0

    def __post_init__(self):
        name = f"channel {self.channel.number}"
        if not (self.noise >= 0 and self.bias >= 0 and self.scan_bias >= 0):
            raise ChannelError(
                f"{name}: noise={self.noise}, bias={self.bias} and scan_bias={self.scan_bias} must not be negative"
            )
        if not self.depth_pressure > 0:
            raise ChannelError(f"{name}: unit_depth={self.depth_pressure} is no pressure in Pa; give one")
        if not 0.3 <= self.width <= 5:
            raise ChannelError(f"{name}: width={self.width} must lie in [0.3, 5], in ln(p)")
        if not 0 < self.emissivity <= 1:
            raise ChannelError(f"{name}: emissivity={self.emissivity} must lie in (0, 1]")

    @property
    def depth_pressure(self) -> float:
        """p1 in Pa, whichever way it was given."""
        return self.channel.peak_pressure if self.unit_depth is None else self.unit_depth

    @property
    def exponent(self) -> float:
        """k of the optical depth."""
        return _HALF_WIDTHS / self.width


def optical_depth(
    channels: tuple[SounderChannel, ...], pressure: Float[np.ndarray, "*N K"], zenith: Float[np.ndarray, "*N"]
) -> Float[np.ndarray, "*N C K"]:
    """Optical depth from space to pressures in Pa, along the line of sight of zenith angles in degrees below 90."""
    exponent = np.array([channel.exponent for channel in channels])[:, None]
    unit = np.array([channel.depth_pressure for channel in channels])[:, None]
    return (pressure[..., None, :] / unit) ** exponent / np.cos(np.deg2rad(zenith))[..., None, None]


def weighting_function(
    channels: tuple[SounderChannel, ...], pressure: Float[np.ndarray, "*N K"], zenith: Float[np.ndarray, "*N"]
) -> Float[np.ndarray, "*N C K"]:
    """Weight per unit of ln(p) of the air at pressures in Pa; 1 minus its integral down to the ground is the weight of
    the ground, exp(-optical depth there).
    """
    depth = optical_depth(channels, pressure, zenith)
    return np.array([channel.exponent for channel in channels])[:, None] * depth * np.exp(-depth)


def brightness_temperature(
    channels: tuple[SounderChannel, ...],
    pressure: Float[np.ndarray, "*N K"],
    temperature: Float[np.ndarray, "*N K"],
    zenith: Float[np.ndarray, "*N"],
) -> Float[np.ndarray, "*N C"]:
    """Brightness temperatures in K of columns whose temperature is linear in ln(p) between nodes.

    By parts, the mean under the weights is T_top + sum of dT/dln(p) times the integral of exp(-delta) over ln(p), which
    is (E1(delta above) - E1(delta below)) / k on each segment: exact, without quadrature.

    Args:
      channels: C channels.
      pressure: Pa at the nodes, the ground first, upwards.
      temperature: K at the nodes.
      zenith: degrees, below 90.
    """
    depth = optical_depth(channels, pressure, zenith)
    exponent = np.array([channel.exponent for channel in channels])[:, None]
    seen = np.diff(exp1(depth), axis=-1) / exponent
    slope = np.diff(temperature, axis=-1) / np.diff(np.log(pressure), axis=-1)
    whole = temperature[..., -1:] + np.einsum("...ck,...k->...c", seen, slope)
    ground = np.exp(-depth[..., 0])
    reflected = 1.0 - np.array([channel.emissivity for channel in channels])
    return whole - reflected * ground**2 * temperature[..., :1]
