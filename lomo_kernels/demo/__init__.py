"""`python -m lomo_kernels demo`: a small language model, fine-tuned with LOMO and its rivals on this machine's own text."""
