"""Head profiles: a method for every head, as a value, a file and a page."""
