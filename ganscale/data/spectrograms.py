"""Spectrograms of synthesised sounds: arrays of floats that need neither data nor a network.

Four classes of half a second at 8 kHz: tones that glide, tones with harmonics and vibrato, vowels
(pulses of a voice through three resonances that move from one vowel to another), and bursts of
noise in a rhythm. Each is a 64x64 array of the short-time Fourier transform's magnitudes in
decibels, highest frequency first, as pictures of them are drawn. Array i of a split is the same
everywhere. It stands for speech as the procedural pictures stand for photographs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESOLUTION = 64
SAMPLE_RATE = 8000
SPLIT_SIZES = {"train": 8_000, "test": 2_000}
_SPLIT_SEEDS = {"train": 3, "test": 4}
_WINDOW = 2 * RESOLUTION
_HOP = 64
_NUM_SAMPLES = _WINDOW + (RESOLUTION - 1) * _HOP
_FLOOR = 1e-4
"""What is added to all magnitudes, so that none is below -80 dB; also the background noise."""
_VOWELS = (
    (270, 2290, 3010),
    (530, 1840, 2480),
    (730, 1090, 2440),
    (570, 840, 2410),
    (300, 870, 2240),
)
"""Centres of the first three resonances in Hz: men's means of Peterson and Barney (1952)."""
_BANDWIDTHS = (80, 110, 150)
_RINGING = 480
"""Samples of a pulse's resonances; the longest has died away to 3e-7 by then."""


def spectrogram(split: str, index: int) -> tuple[npt.NDArray[np.float32], int]:
    """Array `index` of a split: float32 (1, 64, 64) in decibels, and its label in 0..3."""
    rng = np.random.Generator(np.random.Philox(key=[_SPLIT_SEEDS[split], index]))
    label = index % len(CLASSES)
    signal = _SOUNDS[CLASSES[label]](rng, np.arange(_NUM_SAMPLES) / SAMPLE_RATE)
    # Equally loud, over a faint noise, so that no array is constant where the sound is silent.
    signal = signal / np.abs(signal).max() + _FLOOR * rng.standard_normal(_NUM_SAMPLES)
    decibels = 20 * np.log10(magnitudes(signal) + _FLOOR)
    # Rounded far below what matters, so that machines whose last bits differ agree.
    return np.round(decibels[None], 2).astype(np.float32), label


def magnitudes(signal: Array) -> Array:
    """(64, 64) of the short-time Fourier transform: frequencies from 4 kHz down, by time.

    Hann windows of 128 samples at every 64th; a sine of amplitude 1 on a bin has magnitude 1.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    frames = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::_HOP]
    spectra = np.abs(np.fft.rfft(frames * window)) / (window.sum() / 2)
    # Without the constant component: 65 frequencies become 64.
    magnitudes: Array = spectra[:, :0:-1].T
    return magnitudes


def _glide(rng: np.random.Generator, t: Array) -> Array:
    """A tone from one frequency to another, evenly in octaves, that fades in and out."""
    start, end = np.exp(rng.uniform(np.log(300), np.log(3500), 2))
    frequency = start * (end / start) ** (t / t[-1])
    return _fade(rng, t) * np.sin(_phase(frequency))


def _harmonics(rng: np.random.Generator, t: Array) -> Array:
    """A tone of 300 to 700 Hz with its harmonics, each weaker than the one before, and vibrato."""
    depth, rate = rng.uniform(0, 0.06), rng.uniform(4, 9)
    swing = depth * np.sin(2 * np.pi * (rate * t + rng.uniform(0, 1)))
    frequency = rng.uniform(300, 700) * (1 + swing)
    slope = rng.uniform(0.6, 1.6)
    wave = np.zeros_like(t)
    # Up to 3800 Hz, since a harmonic above half the sampling rate would come back as a wrong one.
    for number in range(1, 1 + int(3800 / frequency.max())):
        wave += number**-slope * np.sin(number * _phase(frequency))
    return _fade(rng, t) * wave


def _vowel(rng: np.random.Generator, t: Array) -> Array:
    """A voice of 90 to 220 Hz: each pulse rings with the resonances of its moment."""
    pitch = rng.uniform(90, 220) * (1 + rng.uniform(-0.25, 0.25) * t / t[-1])
    size = rng.uniform(0.95, 1.25)
    first, last = (np.array(_VOWELS[i]) * size for i in rng.integers(len(_VOWELS), size=2))
    starts = np.flatnonzero(np.diff(np.floor(_phase(pitch) / (2 * np.pi))) > 0)
    wave = np.zeros_like(t)
    for start in starts:
        # From the first vowel to the second in an S-shaped transition around the middle.
        share = 1 / (1 + np.exp(-10 * (t[start] / t[-1] - 0.5)))
        stop = start + _RINGING
        since = t[start:stop] - t[start]
        for centre, width in zip(first + share * (last - first), _BANDWIDTHS, strict=True):
            wave[start:stop] += np.exp(-np.pi * width * since) * np.sin(2 * np.pi * centre * since)
    return _fade(rng, t) * wave


def _beats(rng: np.random.Generator, t: Array) -> Array:
    """Bursts of noise around a frequency, at an even distance, that die away."""
    noise = rng.standard_normal(len(t))
    spectrum = np.fft.rfft(noise)
    distance = np.abs(np.fft.rfftfreq(len(t), 1 / SAMPLE_RATE) - rng.uniform(300, 3500))
    band = np.fft.irfft(spectrum * np.exp(-((distance / rng.uniform(200, 900)) ** 2)), len(t))
    period = rng.uniform(0.07, 0.2)
    since = (t + rng.uniform(0, period)) % period
    wave: Array = band * np.exp(-since / rng.uniform(0.01, 0.04)) * (1 - np.exp(-since / 0.004))
    return wave


def _phase(frequency: Array) -> Array:
    return 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE


def _fade(rng: np.random.Generator, t: Array) -> Array:
    """1 with soft ends, both at random."""
    start, end = rng.uniform(0, 0.25) * t[-1], rng.uniform(0.75, 1) * t[-1]
    level: Array = 1 / (1 + np.exp(-(t - start) / 0.008)) / (1 + np.exp((t - end) / 0.008))
    return level


_SOUNDS: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "glide": _glide,
    "harmonics": _harmonics,
    "vowel": _vowel,
    "beats": _beats,
}
CLASSES = tuple(_SOUNDS)
