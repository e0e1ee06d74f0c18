"""The packages of a distribution; all else stands in pyproject.toml.

The configurations are a folder of their own in a checkout, and `svae_jax/configs` in a wheel.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["svae_jax*"]), "svae_jax.configs"],
    package_dir={"svae_jax.configs": "configs"},
)
