"""Engines that spread a model, or its batches, over several processes. A new one is a file, and a line in choose.py."""
