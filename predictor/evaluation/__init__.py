"""Evaluation of forecasters on test batches: metrics, comparison with baselines, tables, plots and report.html.

`metrics` defines each metric, `scores` collects one forecaster's metrics with confidence intervals, `comparison` runs
all forecasters on the same batches, `segments` scores topics and languages apart, `tables`, `plots` and `report` show
the results.
"""
