"""The `.nemo` format in which Nemotron-4 was published: an unpacked directory or a tar archive."""
