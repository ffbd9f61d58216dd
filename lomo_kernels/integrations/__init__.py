"""What ties `lomo_kernels.Lomo` to other libraries, one file each. None of them is needed otherwise, or imported."""
