"""Shared fixtures."""

import jax
import pytest

collect_ignore = ["conformance/many_devices.py"]  # a program for eight devices, run by its test


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield
