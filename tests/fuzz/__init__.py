"""Random operator calls, state dicts and models, each from one printed seed. ``make fuzz MINUTES=10`` runs it."""
