"""The hypervolume of a front, by which benchmarks and tests compare searches."""

from autopeft.utils.pareto import hypervolume

__all__ = ["hypervolume"]
