"""What surrounds a run: arguments, servers, run folder, terminal output, and the samples taken beside training."""
