"""Shared fixtures."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield
