"""Tables and pictures of the experiments with fixed factors, from their records.

The code that did the runs is at commit 94e086b.
"""
