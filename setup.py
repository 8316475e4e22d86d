"""Which packages the distribution holds; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["fastmim", "fastmim.*"]), package_data={"fastmim": ["py.typed"]})
