"""Benchmarks: ours beside a peer, in one run, as ratios.

    python -m bench             what there is
    python -m bench.startup     run one; it prints a table, stores its result and ends with one line of JSON
    python -m scripts.benchmarks    docs/benchmarks.md from the stored results

A benchmark is a module with a `main`. It takes turns between the sides (`turns.py`), because two runs on
different days measure the days, and reports medians as `record.Row`s.
"""
