"""What a run leaves for people: metrics, held-out results with intervals, figures, one page."""

from corefit.report.curves import curves
from corefit.report.metrics import MetricsLog, read_metrics, write_whole
from corefit.report.page import page
from corefit.report.results import Row, Scores, read_results, results, write_results
from corefit.report.sheets import animation, comparison, grid, shown
from corefit.report.table import print_table

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
    "write_whole",
]
