"""The whole way at toy size, on text that comes with the package."""
