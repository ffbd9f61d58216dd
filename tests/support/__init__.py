"""What tests share and what is no test: the oracle, the textbook, models, processes, a pretended GPU."""
