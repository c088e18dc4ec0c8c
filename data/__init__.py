"""Records to batches: drawn or read, filtered, sharded, mixed by arithmetic, loaded.

source -> Record -> shard (tar + receipt) -> manifest -> mixture (global sample i) -> Batch
"""
