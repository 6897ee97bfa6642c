"""The parts of benchmarks/study.py, in the order in which it needs them

plan (which runs there are), file (reads them from YAML), train (does one), results (keeps them), runner (does those
that are missing), measure (differences and intervals), report (tables), picture, smoke (a tiny study).
"""
