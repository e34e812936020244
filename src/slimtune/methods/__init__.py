"""In which turns it is learned: a method is a function in one file and a row in ``METHODS``."""
