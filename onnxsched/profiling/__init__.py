"""Measuring operators on the device they will run on."""
