"""Tables and pictures, from result files only."""

from rayclip.reports.grid import example_grid
from rayclip.reports.retrieval import retrieval_tables
from rayclip.reports.table import Table, result_tables

__all__ = ["Table", "example_grid", "result_tables", "retrieval_tables"]
