"""ZeRO data parallelism for Colossal: gradients and optimizer state divided over ranks, exact to one process."""
