"""CPU and GPU kernels for linear layers and attention, and the packed forms of weights that they multiply."""
