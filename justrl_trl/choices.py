"""Enumerations shared by options, graders and reports."""

from enum import StrEnum


class Grader(StrEnum):
    """Graders of evaluation and validation."""

    RULE = "rule"  # the paper's tables
    MATH_VERIFY = "math_verify"  # the reference's validation during training, the paper's Figure 1
