"""Per-case rows to tables, statistics, figures and the HTML report."""
