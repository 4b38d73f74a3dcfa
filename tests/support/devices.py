"""Tests that hold on every device: on the CPU always, on CUDA where `-m gpu` asks for it."""

from __future__ import annotations

import pytest

on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
)
"""Gives a test `device`, as torch names it."""
