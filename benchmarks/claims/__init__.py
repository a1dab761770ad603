"""The paper's claims, measured: what writes the figures and tables of ``docs/claims``.

Run ``python -m benchmarks.claims`` in the root of the repository.
"""
