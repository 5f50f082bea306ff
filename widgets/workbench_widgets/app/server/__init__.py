"""Where a server answers, and what it tells a page of its address and its connection."""
