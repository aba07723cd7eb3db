"""What both recipes share."""
