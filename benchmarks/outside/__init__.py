"""Tasks that others wrote: see ``run.py``."""
