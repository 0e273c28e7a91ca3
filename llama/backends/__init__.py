"""Backends: the ways to compute a decode step, and the choice of a backend for a device."""
