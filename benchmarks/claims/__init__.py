"""Measurements of the paper's claims, which write the figures and tables of ``docs/claims``.

Run ``python3 -m nox -s bench -- claims``.
"""
