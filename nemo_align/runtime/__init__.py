"""Where a run runs: device, process groups, launch environment, seeds, signals, logging."""
