"""How good embeddings are: verification, identification, the protocols of the field's test sets, collapse."""

from sst_fast.evaluation.blocked import Comparisons, all_pairs, cmc, pair_scores, search
from sst_fast.evaluation.collapse import Collapse, collapse, effective_rank
from sst_fast.evaluation.distribution import FARS, PairScores, Rate
from sst_fast.evaluation.verification import Scores, evaluate, roc

__all__ = [
    "FARS",
    "Collapse",
    "Comparisons",
    "PairScores",
    "Rate",
    "Scores",
    "all_pairs",
    "cmc",
    "collapse",
    "effective_rank",
    "evaluate",
    "pair_scores",
    "roc",
    "search",
]
