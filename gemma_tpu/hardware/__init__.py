"""Chips, slices and prices as data; the devices and hosts of a run."""
