"""Responses from any number of vLLM servers: HTTP client, pool, dispatch, and their way to every rank."""
