"""Reports: one self-contained HTML page with tables and plots."""

from prunekit.report.page import Table, write_report
from prunekit.report.plots import loss_by_sparsity, loss_by_speed, loss_off_task

__all__ = ["Table", "loss_by_sparsity", "loss_by_speed", "loss_off_task", "write_report"]
