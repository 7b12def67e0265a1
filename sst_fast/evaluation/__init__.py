"""How good embeddings are: verification, identification, the protocols of the field's test sets, collapse."""

from sst_fast.evaluation.binfile import BinFile, read_bin
from sst_fast.evaluation.blocked import Comparisons, Found, all_pairs, cmc, pair_scores, search
from sst_fast.evaluation.collapse import Collapse, collapse, effective_rank, singular_spectrum
from sst_fast.evaluation.distribution import FARS, PairScores, Rate
from sst_fast.evaluation.folds import Folds, PairList, read_pairs, verify_in_folds
from sst_fast.evaluation.identification import (
    Blufr,
    BlufrResult,
    blufr,
    dir_at_far,
    rank1_among_distractors,
    read_blufr,
)
from sst_fast.evaluation.templates import (
    Ijb,
    pool_templates,
    read_ijb,
    template_identification,
    template_verification,
)
from sst_fast.evaluation.verification import Scores, evaluate, roc

__all__ = [
    "FARS",
    "BinFile",
    "Blufr",
    "BlufrResult",
    "Collapse",
    "Comparisons",
    "Folds",
    "Found",
    "Ijb",
    "PairList",
    "PairScores",
    "Rate",
    "Scores",
    "all_pairs",
    "blufr",
    "cmc",
    "collapse",
    "dir_at_far",
    "effective_rank",
    "evaluate",
    "pair_scores",
    "pool_templates",
    "rank1_among_distractors",
    "read_bin",
    "read_blufr",
    "read_ijb",
    "read_pairs",
    "roc",
    "search",
    "singular_spectrum",
    "template_identification",
    "template_verification",
    "verify_in_folds",
]
