"""Measurements of the paper's claims, which write the figures and tables of ``docs/claims``.

Run ``python -m benchmarks.claims`` in the root of the repository.
"""
