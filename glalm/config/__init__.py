"""A run's configuration: the dataclasses behind configs/, their checks, and what makes two runs the same.

Hydra composes the YAML files under configs/ into one tree; `build` in strict.py turns that tree into the dataclasses.
Nothing is imported here, so that a wrong config is refused before any heavy library is loaded.
"""
