"""The trainer and what one rollout step needs: rewards, advantages, old log-probabilities, optimizer, metrics."""
