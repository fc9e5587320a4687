"""nemo_align: the Nemotron-4-340B alignment recipe as a package that runs."""

__version__ = "0.1.0"
