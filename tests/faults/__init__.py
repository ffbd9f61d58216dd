"""Faults put into every point of a step, and what is left after them: see `docs/faults.md`.

``make faults`` runs all of it, ``make faults ARGS="memory lines"`` a part. tests/test_faults.py runs a sample.
"""
