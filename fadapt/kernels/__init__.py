"""Fast kernels, each beside the plain torch that it must equal; imported on use."""
