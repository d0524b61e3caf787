"""What a run leaves for people: metrics, held-out results with intervals, figures, one page."""

from corefit.run.report.curves import curves
from corefit.run.report.metrics import MetricsLog, read_metrics
from corefit.run.report.page import page
from corefit.run.report.results import Row, Scores, read_results, results, write_results
from corefit.run.report.sheets import animation, comparison, grid, shown
from corefit.run.report.table import print_table

__all__ = [
    "MetricsLog",
    "Row",
    "Scores",
    "animation",
    "comparison",
    "curves",
    "grid",
    "page",
    "print_table",
    "read_metrics",
    "read_results",
    "results",
    "shown",
    "write_results",
]
