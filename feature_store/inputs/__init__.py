"""Input images: tars, folders or parquet files as SampleSources."""
