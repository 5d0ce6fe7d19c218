"""A judge of another kind: TF-IDF of a reply's words and word pairs, and a logistic regression for each source. It reads no prompt.

It is here to be compared with. Adapters on one base err alike: what fools one fools its witness, so that a second adapter alone is a weak
witness (arXiv:2312.09244, and docs/overoptimisation.md). This one errs otherwise. scikit-learn, because it is the field's own for this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from gemma_grpo.reward.base import Scores
from gemma_grpo.types import PreferencePair, RolloutGroup

_TOKEN = r"(?u)\w+|[^\w\s]"


class LexicalReward:
    """Learned from preference pairs in seconds; log-odds of being preferred, up to a constant of the prompt."""

    name = "lexical"

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        """Raises ValueError for no pairs."""
        if not pairs:
            raise ValueError("a lexical judge learns from preference pairs, and there are none.")
        self._vectorizer = TfidfVectorizer(token_pattern=_TOKEN, ngram_range=(1, 2), sublinear_tf=True, min_df=2 if len(pairs) > 100 else 1)
        self._vectorizer.fit([text for pair in pairs for text in (pair.chosen, pair.rejected)])
        sources = sorted({pair.source for pair in pairs})
        self._weights = {source: self._fit([pair for pair in pairs if pair.source == source]) for source in sources}
        self._mean: NDArray[np.float64] = np.mean(list(self._weights.values()), axis=0)

    def _fit(self, pairs: Sequence[PreferencePair]) -> NDArray[np.float64]:
        chosen, rejected = (self._vectorizer.transform([getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected"))
        # every second pair turned round: the regression needs both labels, and no intercept
        signs = np.where(np.arange(len(pairs)) % 2, -1.0, 1.0)
        if len(pairs) < 2:
            return np.zeros(chosen.shape[1])
        differences = (chosen - rejected).multiply(signs[:, None]).tocsr()
        regression = LogisticRegression(fit_intercept=False, C=10.0, max_iter=1000).fit(differences, signs > 0)
        return np.asarray(regression.coef_[0], dtype=np.float64)

    def score_texts(self, texts: Sequence[str], sources: Sequence[str]) -> list[float]:
        """One number per reply; of a source it never saw by the mean of all."""
        rows = self._vectorizer.transform(texts)
        weights = np.array([self._weights.get(source, self._mean) for source in sources])
        return [float(value) for value in np.asarray(rows.multiply(weights).sum(axis=1)).ravel()]

    def score(self, groups: Sequence[RolloutGroup]) -> Scores:
        """One number per completion, [N][G]."""
        texts = [completion.text for group in groups for completion in group.completions]
        flat = iter(self.score_texts(texts, [group.prompt.source for group in groups for _ in group.completions]) if texts else ())
        return [[next(flat) for _ in group.completions] for group in groups]
