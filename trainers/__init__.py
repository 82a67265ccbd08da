"""Trainers built on ``moegeo_router``, run from a clone of the repository: ``python -m trainers.train``."""
