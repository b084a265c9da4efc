"""`mmrag` over many processes: Ray Data stages, Ray Train, index shard actors, MLflow."""
