"""One file per method that reads its checkpoint, and the table of them."""
