"""The bytes of all versions: content-addressed files in a folder or a bucket."""
