"""Checks of the machines before a job: `nemo-align doctor`, and its cheap part at the start of every job.

Nothing here changes anything: versions, GPUs, disk, files and links are looked at and reported with their remedies.
"""
