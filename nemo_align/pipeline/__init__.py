"""The chain of stages: hand-off, manifest, resume, launching here or through SLURM, table and report. Without torch."""
