"""What a configuration needs and yields before it runs: parameters, memory, time, layouts. docs/plan.md explains it."""
