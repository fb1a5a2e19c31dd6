"""Where prunekit meets other libraries."""
