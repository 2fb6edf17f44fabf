"""Training rows out of thin air, uneven where real ones are, so that a mean taken of means would show."""

from dataclasses import dataclass

import numpy as np

from paraxis.base.seams import IGNORE


@dataclass
class MadeRows:
    """Random tokens whose rows differ in how many targets they train on, so that a mean of means would show.

    With `documents`, every row holds several documents of uneven length, one of which ends in the middle of the row.
    """

    vocab_size: int
    seq_len: int
    documents: bool = False
    length: int = 1 << 30
    fingerprint: str = "made"

    def row(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(index)
        tokens = rng.integers(0, self.vocab_size, self.seq_len + 1)
        targets = tokens[1:].copy()
        targets[rng.random(self.seq_len) < rng.uniform(0.0, 0.7)] = IGNORE
        row = {"tokens_bt": tokens[:-1], "targets_bt": targets, "positions_bt": np.arange(self.seq_len)}
        if self.documents:
            ends = sorted({self.seq_len // 2, *rng.integers(1, self.seq_len, 3).tolist()})
            document = np.searchsorted(ends, np.arange(self.seq_len), side="right")
            starts = np.array([0, *ends])[document]
            row |= {"positions_bt": np.arange(self.seq_len) - starts, "documents_bt": document}
            targets[np.array(ends) - 1] = IGNORE
        return row
