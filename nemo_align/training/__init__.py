"""The one training loop, the one forward-only runner, optimizer, schedules, metrics and throughput."""
