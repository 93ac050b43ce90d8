"""Training one cell: roles, model, optimizer, data, checkpoints, probes, the loop."""
