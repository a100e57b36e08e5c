"""What becomes of finished runs: tables, statistics, plots, one page to read."""
