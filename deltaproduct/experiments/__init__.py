"""Experiments: each a function that returns a list of jobs, and the runner that carries them out."""
