"""Processors: every file here may travel to a Hub repository on its own."""
