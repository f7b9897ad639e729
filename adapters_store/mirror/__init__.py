"""What a server holds of the index in memory, kept current by the change feed."""
