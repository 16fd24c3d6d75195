"""Problems in, checked prompts out; the benchmarks; the embedded model and its task."""
