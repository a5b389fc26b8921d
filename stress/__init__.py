"""Rough treatment: random cases against a plain loop, faults, and hours of small batches; see docs/reliability.md.

Unlike the benchmarks these commands may use the helpers of the tests. Each prints a table and, in a pipe, one line of
JSON; the exit code is 1 if a promise was not kept.
"""
