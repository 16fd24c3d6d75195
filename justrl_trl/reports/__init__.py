"""Numbers for people: scores with errors, tables, figures, the paper's own results."""
