"""The policy on its way to the rollout servers: stream, broadcast, proof of arrival."""
