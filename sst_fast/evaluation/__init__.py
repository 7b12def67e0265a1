"""How good embeddings are: verification, identification, the rank of the features."""

from sst_fast.evaluation.verification import Scores, effective_rank, evaluate, roc

__all__ = ["Scores", "effective_rank", "evaluate", "roc"]
