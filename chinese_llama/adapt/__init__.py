"""Every stage of an adaptation from one workspace file."""
