"""`python -m lomo_kernels demo`: a small language model, fine-tuned with LOMO, SGD and AdamW on text found anywhere."""
