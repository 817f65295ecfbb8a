"""Packages that lie outside moejax/: the kernel library, and configs and assets as package data."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(".", include=["moejax", "moejax.*"]),
        *find_packages("kernels"),
        "moejax.configs",
        "moejax.assets",
    ],
    package_dir={
        "moejax_kernels": "kernels/moejax_kernels",
        "moejax.configs": "configs",
        "moejax.assets": "assets",
    },
    package_data={
        "moejax.configs": ["**/*.gin"],
        "moejax.assets": ["**/*"],
        "moejax_kernels": ["**/*.json"],
    },
)
