"""The model as it is scored and trained: packed rows, attention, loss, work shared among ranks."""
