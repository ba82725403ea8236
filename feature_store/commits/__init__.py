"""What makes rows readable: commit records, their index, locks and orphans."""
