"""Every network of the zoo is checked, where its packages are installed."""

import importlib

import pytest
from zoo.catalogue import MODULES, NETWORKS, check

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]
for module in MODULES:
    importlib.import_module(f"zoo.{module}")


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    for package in MODULES[NETWORKS[name].build.__module__.rpartition(".")[2]]:
        pytest.importorskip(package)
    check(name)
