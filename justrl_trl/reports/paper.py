"""What the paper reports (arXiv 2512.16649): Tables 3 and 5, Figure 1. In percent, as printed, from `paper_facts.yaml`.

The tables and the figure are two different measurements and do not agree: the tables come from the repository's `evals/`
(rule grader, then CompassVerifier-3B), the figure from the validation inside training (math-verify). The DeepSeek run scores
52.60 on AIME 2024 in Table 3, from rollout step 4,380, and 58.59 in Figure 1, at rollout step 4,860.
"""

from functools import cache
from importlib.resources import files

import yaml


@cache
def _facts() -> dict:
    return yaml.safe_load(files(__package__).joinpath("paper_facts.yaml").read_text(encoding="utf-8"))


def _of(facts: dict, family: str):
    if family not in facts:
        raise ValueError(f"the paper has no model family {family!r}: choose from {', '.join(facts)}.")
    return facts[family]


def table_number(family: str) -> int:
    """Number of the family's results table in the paper: 3 or 5."""
    return _of(_facts()["families"], family)["table"]


def table_rows(family: str) -> dict[str, dict[str, float | None]]:
    """Rows of the family's table, in the paper's order.

    Args:
        family: "deepseek" (Table 3) or "nemotron" (Table 5).

    Returns:
        {model: {benchmark name: avg@N in percent, ..., "avg": the printed average}}; None where the paper gives no number.
    """
    columns = [*_facts()["benchmarks"], "avg"]
    rows = _of(_facts()["families"], family)["rows"]
    return {model: dict(zip(columns, values, strict=True)) for model, values in rows.items()}


def figure1(family: str) -> dict[int, float]:
    """Figure 1, AIME 2024 avg@32 in percent by rollout step; read off the plot to +-0.5, first and last point as printed."""
    return dict(_of(_facts()["figure1"], family))


def family_of(model_name: str) -> str | None:
    """Family of a Hub id or path that holds the name of the paper's base or trained model; None for any other model.

    Case, and `_` for `-`, make no difference: "runs/justrl_deepseek_1.5b" is of the DeepSeek family.
    """
    plain = str(model_name).lower().replace("_", "-")
    for family, facts in _facts()["families"].items():
        if any(model.lower() in plain for model in facts["models"]):
            return family
    return None
