"""The report of an adaptation: one HTML page that needs no network, its Markdown twin, and text for a terminal."""
