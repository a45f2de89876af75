"""One HTML page about a training run."""

from proxbit.analysis.report.page import write_report

__all__ = ["write_report"]
