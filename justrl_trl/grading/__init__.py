"""Verdicts on responses: the recipe's string rule, the evaluation grader and its processes. Loads neither torch nor TRL."""
