"""How good a transcript is: error rates with intervals, their differences, entities, recall.

Everything is a sum of counts divided once. Knows texts and token ids alone.
"""

from mmrag.score.biasing import BiasingScore, biasing_error_rates, weighted_alignment
from mmrag.score.entities import (
    Detection,
    EntityCounts,
    EntityScore,
    count_entities,
    detect_entities,
    entity_names,
    entity_recall,
    entity_score,
    score_entities,
)
from mmrag.score.rates import (
    Edit,
    ErrorRate,
    align,
    character_counts,
    error_rate,
    word_counts,
    word_error_rate,
)
from mmrag.score.recall import Recall, recall_at_k
from mmrag.score.significance import (
    Comparison,
    Difference,
    compare,
    compare_counts,
    paired_difference,
)
from mmrag.text import normalise

__all__ = [
    "BiasingScore",
    "Comparison",
    "Detection",
    "Difference",
    "Edit",
    "EntityCounts",
    "EntityScore",
    "ErrorRate",
    "Recall",
    "align",
    "biasing_error_rates",
    "character_counts",
    "compare",
    "compare_counts",
    "count_entities",
    "detect_entities",
    "entity_names",
    "entity_recall",
    "entity_score",
    "error_rate",
    "normalise",
    "paired_difference",
    "recall_at_k",
    "score_entities",
    "weighted_alignment",
    "word_counts",
    "word_error_rate",
]
