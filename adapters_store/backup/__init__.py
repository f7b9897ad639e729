"""The whole index and all files that it names, in one file and back."""
