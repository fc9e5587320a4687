"""Checks of the machines before a job: `nemo-align doctor`, and most of it at the start of every job.

Nothing here changes anything: versions, GPUs, disk, files and links are looked at and reported with their remedies.
"""
