"""Executors: what runs an execution plan."""
