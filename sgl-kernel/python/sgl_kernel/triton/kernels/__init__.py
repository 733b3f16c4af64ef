"""The kernels themselves, in Triton's language; their wrappers stand one package above."""
