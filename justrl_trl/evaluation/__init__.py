"""The paper's evaluation: tasks, sampling, stored samples, grades, the verifier, results."""
