"""From row addresses to verified rows in memory."""
