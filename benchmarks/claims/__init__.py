"""The paper's claims, measured: what writes the figures and tables of ``docs/claims``.

Run ``python3 -m nox -s bench -- claims``.
"""
