"""Images: from folders, arrays, named data sets."""
