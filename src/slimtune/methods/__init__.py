"""In which turns a model is learned: one function a method."""
