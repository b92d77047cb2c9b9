"""Lightning callbacks: guided validation sampling, EMA, per-case rows, figures and reports."""
