"""Launchers: a local queue with slots, SLURM through submitit, and a real one-node SLURM for tests."""
