"""The Nemotron architecture as Megatron-core config and layers, the reward head, parameter and FLOP counts."""
