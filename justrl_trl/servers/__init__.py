"""A vLLM server process: start, device, key, and the weight-transfer engines inside it. Loads no TRL."""
