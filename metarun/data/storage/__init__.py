"""Files behind the data sets: downloads, imports, stores, image files."""
