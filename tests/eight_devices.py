"""The environment of a process that has eight devices."""

import os

FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
ENVIRONMENT = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
