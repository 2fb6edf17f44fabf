"""From raw text to training rows: sources, tokens, a cache of tokenised shards, packed rows, and the loader of a data rank.

    DataConfig -> prepare(config, cache) -> Prepared -> TrainingRows / PackedRows / HeldOutRows -> Loader / evaluation_batches
    DataConfig -> FilePools / StreamPools -> LiveRows ---- several of either, mixed: MixtureRows

The position in the data is one integer, the index of the next row; every rank computes the same row from it. LiveRows, which are
tokenised meanwhile, add where in the text the pool of that row begins.
"""
