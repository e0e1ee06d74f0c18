"""Devices: sharding, compiler options and how a process is set up."""
