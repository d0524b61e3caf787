"""What a run writes for people to read: metrics, held-out results with intervals, figures, and one page."""

from corefit.run.report.curves import curves
from corefit.run.report.export import csv_text, markdown
from corefit.run.report.metrics import MetricsLog, read_metrics
from corefit.run.report.page import comparison_page, page
from corefit.run.report.results import (
    BLOCKS,
    Block,
    Row,
    Scores,
    blocks_of,
    read_results,
    results,
    unit_of,
    write_results,
)
from corefit.run.report.sheets import animation, comparison, grid, visible_frames
from corefit.run.report.table import print_table

__all__ = [
    "BLOCKS",
    "Block",
    "MetricsLog",
    "Row",
    "Scores",
    "animation",
    "blocks_of",
    "comparison",
    "comparison_page",
    "csv_text",
    "curves",
    "grid",
    "markdown",
    "page",
    "print_table",
    "read_metrics",
    "read_results",
    "results",
    "unit_of",
    "visible_frames",
    "write_results",
]
