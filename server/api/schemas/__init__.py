"""The bodies that clients send, one file per noun. Checked strictly: an unknown field or a wrong type is refused."""
