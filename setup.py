"""Which packages there are: all wings, and the units of systemd, which lie beside them in a checkout."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["framepack_core*", "framepackd*"]), "framepackd.systemd"])
