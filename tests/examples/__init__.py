"""Short programs that use metarun from Python."""
