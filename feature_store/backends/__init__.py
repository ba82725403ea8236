"""Where a store's objects live: local files, buckets, web servers, and a read-through cache."""
