"""Checks and estimates before anything starts: GPU memory, driver, addresses and folders of several nodes, disk."""
